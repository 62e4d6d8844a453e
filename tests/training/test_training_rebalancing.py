"""Rebalancing in the network and in the trainer: single-modality passes, weights per epoch, resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import BRATS_JSON, make_trainer, network, options_with, plans, write_dataset
from torch import distributed as dist
from training_cases import run_until_epoch, synthetic_batch

from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.network.interface import Needs, SingleModalities, View
from nnunetv2_mgml.objective.balance import ModalityBalance, updated_beta
from nnunetv2_mgml.objective.rebalancing import Balance, rebalancing_terms
from nnunetv2_mgml.training import nnUNetTrainerMGML
from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log

CPU = torch.device("cpu")
CHANNELS = ("t1", "t1ce", "t2", "flair")
PASSION = {"rebalancing": "passion", "mask_sampling": "fixed", "soft_label": "none", "consistency_weight": 0.0}
"""Published setting: what the case has, nothing of MGML."""


# --- network ----------------------------------------------------------------------------------------------------------
AVAILABLE = torch.tensor([[True, False, True, True], [True, True, False, True]])
MASK = torch.tensor([[True, False, False, True], [False, True, False, False]])


def image() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fusion", ["mean", "concat", "region_aware"])
def test_students_see_one_modality_and_the_teacher_all_that_exist(fusion: str) -> None:
    net = network(options_with(fusion=fusion, width_factor=1.0), deep_supervision=True).eval()
    x = image()
    with torch.no_grad():
        out = net(x, View(MASK, AVAILABLE), Needs(complete="target", single=True))
        assert [tuple(s.shape) for s in out.single.students] == [(2, 4, 3, 16, 16, 16), (2, 4, 3, 8, 8, 8)]
        for m in range(4):
            alone = torch.eye(4).bool()[m].expand(2, 4)
            expected = net(x, View(alone, AVAILABLE))
            for scale, student in zip(expected, out.single.students, strict=True):
                torch.testing.assert_close(student[:, m], scale)
        for scale, teacher in zip(net(x, modality_mask=AVAILABLE), out.single.teacher, strict=True):
            torch.testing.assert_close(teacher, scale)
        head = net.decoder.seg_layers[-1]
        torch.testing.assert_close(head(out.single.teacher_features), out.single.teacher[0])
        torch.testing.assert_close(head(out.single.features[:, 2]), out.single.students[0][:, 2])


def distances(single: SingleModalities) -> torch.Tensor:
    """What a step's balance is made from, ``(B, M)``."""
    labels = torch.randint(0, 4, (2, 16, 16, 16), generator=torch.Generator().manual_seed(2))
    even = Balance.even(4, CPU)
    terms = rebalancing_terms(
        single, labels, [None, None], AVAILABLE, even, num_classes=4, temperature=4.0, regions=True
    )
    return terms.distance.detach()


@pytest.mark.parametrize("complete", ["target", "learns"])
@pytest.mark.parametrize("form", ["multi_encoder", "early_fusion"])
def test_another_terms_augmented_or_noisy_teacher_is_not_this_ones(form: str, complete: Any) -> None:
    """teacher_augmentation and teacher_dropout leave the distances of a step, and so the balance, as they are."""
    net = network(options_with(fusion="mmformer", network_form=form), deep_supervision=True).train()
    needs, random_state = Needs(complete=complete, single=True), torch.random.get_rng_state()
    plain = net(image(), View(MASK, AVAILABLE), needs)
    for own, noisy in ((True, False), (False, True), (True, True)):
        torch.random.set_rng_state(random_state)
        view = View(MASK, AVAILABLE, 3 * image() + 1 if own else None)
        out = net(image(), view, needs._replace(own_view=own, noisy=noisy))
        assert not torch.allclose(out.complete[0], plain.complete[0], atol=1e-2), "that term's teacher is another one"
        single = out.single
        if noisy:  # it has drawn random numbers before the students do
            single = single._replace(students=plain.single.students, features=plain.single.features)
        torch.testing.assert_close(distances(single), distances(plain.single))
        torch.testing.assert_close(single.teacher, plain.single.teacher)
        assert not single.teacher_features.requires_grad


@pytest.mark.parametrize(
    ("needs", "own", "passes"),
    [
        (Needs(complete="target", single=True), False, 6),
        (Needs(complete="target", single=True, own_view=True), True, 7),
        (Needs(complete="target", single=True, noisy=True), False, 7),
        (Needs(complete="target", own_view=True, noisy=True), True, 2),
        (Needs(single=True), False, 5),
    ],
    ids=["plain", "augmented", "noisy", "no students", "alone"],
)
def test_a_teacher_of_its_own_is_a_pass_only_where_it_is_needed(needs: Needs, own: bool, passes: int) -> None:
    net, calls = network(options_with(fusion="mean"), deep_supervision=True), []
    net.decoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    net(image(), View(MASK, AVAILABLE, image() if own else None), needs)
    assert len(calls) == passes
    assert calls.count(False) == passes - 5 * needs.single - (not needs.single)


def test_without_a_teacher_pass_the_prediction_itself_teaches() -> None:
    net = network(deep_supervision=True)
    out = net(image(), View(AVAILABLE), Needs(single=True))
    assert out.complete is None
    for teacher, student in zip(out.single.teacher, out.student, strict=True):
        assert torch.equal(teacher, student)
        assert not teacher.requires_grad
    assert not out.single.teacher_features.requires_grad


@pytest.mark.parametrize("fusion", [*fusion_designs()])
def test_not_asked_for_changes_nothing(fusion: str) -> None:
    """The other outputs have the same bits with and without the single passes, which come last."""
    net = network(options_with(fusion=fusion, width_factor=1.0), deep_supervision=True).train()
    view, needs = View(MASK, AVAILABLE), Needs(complete="target", modality=True)
    torch.manual_seed(0)
    plain = net(image(), view, needs)
    torch.manual_seed(0)
    more = net(image(), view, needs._replace(single=True))
    assert plain.single is None
    for one, two in zip(
        (*plain.student, plain.modality, *plain.complete, *plain.auxiliary, plain.fusion_loss),
        (*more.student, more.modality, *more.complete, *more.auxiliary, more.fusion_loss),
        strict=True,
    ):
        assert torch.equal(one, two)
    assert all(s.isfinite().all() for s in (*more.single.students, more.single.features))


def test_absent_modalities_get_exactly_no_gradient_in_their_encoder() -> None:
    """Case 0 lacks t1ce: whatever the students of t1ce would learn from it reaches nobody."""
    net = network(options_with(fusion="concat", width_factor=1.0, network_form="multi_encoder"), deep_supervision=True)
    available = torch.tensor([[True, False, True, True]])
    out = net(image()[:1], View(available), Needs(single=True))
    terms = rebalancing_terms(
        out.single,
        torch.randint(0, 4, (1, 16, 16, 16)),
        [None, None],
        available,
        Balance.even(4, CPU),
        num_classes=4,
        temperature=4.0,
        regions=True,
    )
    (terms.distillation + 1e3 * terms.prototype).backward()
    reached = [
        sum(float(p.grad.abs().sum()) for p in encoder.parameters() if p.grad is not None) for encoder in net.encoders
    ]
    assert reached[1] == 0
    assert all(value > 0 for m, value in enumerate(reached) if m != 1)


def test_absent_modalities_get_exactly_no_gradient_in_their_column() -> None:
    """The same where one encoder serves all: of its first convolution, the column of t1ce."""
    net = network(deep_supervision=True)
    available = torch.tensor([[True, False, True, True]])
    out = net(image()[:1], View(available), Needs(single=True))
    labels = torch.randint(0, 4, (1, 16, 16, 16))
    balance = Balance.even(4, CPU)
    terms = rebalancing_terms(
        out.single, labels, [None, None], available, balance, num_classes=4, temperature=4.0, regions=True
    )
    (terms.distillation + 1e3 * terms.prototype).backward()
    first = next(p for p in net.encoders.parameters() if p.ndim == 5)
    reached = [float(first.grad[:, m].abs().sum()) for m in range(4)]
    assert reached[1] == 0
    assert all(value > 0 for m, value in enumerate(reached) if m != 1)


@pytest.mark.parametrize(("fusion", "own"), [("concat", False), ("region_aware", False), ("concat", True)])
def test_forward_compiles_as_one_graph_for_all_masks(fusion: str, own: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    net = network(options_with(fusion=fusion, width_factor=1.0), deep_supervision=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for available in (AVAILABLE, AVAILABLE.flip(0)):
        view = View(available, available, 2 * image() if own else None)
        needs = Needs(complete="target" if own else "no", single=True, own_view=own)
        found, expected = compiled(image(), view, needs).single, net(image(), view, needs).single
        torch.testing.assert_close(found.students[0], expected.students[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.features, expected.features, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


# --- weights per epoch ------------------------------------------------------------------------------------------------
def test_beta_by_hand() -> None:
    """d = (0.1, 0.3), mean 0.2: the lag is -+0.5; 1 -+ 0.015 / 2, then root mean square 1."""
    found = updated_beta(torch.ones(2).double(), torch.tensor([0.1, 0.3]).double(), torch.tensor([True, True]), 0.015)
    moved = np.array([0.9925, 1.0075])
    assert found.tolist() == pytest.approx(moved / np.sqrt((moved**2).mean()))


def test_beta_of_four_modalities_has_the_published_norm() -> None:
    """Published: 2 beta / ||beta||, after clipping to 0.1 ... 4."""
    beta, distance = torch.tensor([0.2, 3.9, 1.0, 1.0]).double(), torch.tensor([0.01, 0.5, 0.2, 0.29]).double()
    found = updated_beta(beta, distance, torch.ones(4).bool(), 0.5)
    moved = np.array([max(0.1, 0.2 + 0.5 * (0.04 - 1)), min(4, 3.9 + 0.5 * 1), 1 + 0.5 * -0.2, 1 + 0.5 * 0.16])
    assert moved[:2].tolist() == [0.1, 4.0], "both limits are reached"
    assert found.numpy() == pytest.approx(2 * moved / np.linalg.norm(moved))


def test_a_modality_nobody_had_keeps_its_weight() -> None:
    found = updated_beta(
        torch.ones(3).double(), torch.tensor([0.1, 0.3, 0.0]).double(), torch.tensor([True, True, False]), 0.1
    )
    assert (found / found[2]).tolist() == pytest.approx([0.95, 1.05, 1.0])
    nobody = updated_beta(torch.ones(2).double(), torch.zeros(2).double(), torch.zeros(2).bool(), 0.1)
    assert nobody.tolist() == [1.0, 1.0]


def observed(steps: list[tuple[list[list[float]], list[list[int]]]]) -> ModalityBalance:
    balance = ModalityBalance(("a", "b"), 0.01)
    for distance, available in steps:
        balance.observe(torch.tensor(distance), torch.tensor(available).bool())
    return balance


STEPS: list[tuple[list[list[float]], list[list[int]]]] = [
    ([[0.1, 0.0], [0.3, 0.6]], [[1, 0], [1, 1]]),
    ([[0.2, 0.2], [0.0, 0.4]], [[1, 1], [0, 1]]),
]


def test_epoch_mean_is_over_the_samples_that_have_a_modality() -> None:
    balance = observed(STEPS)
    row = balance.end_epoch(0, 300)
    assert (row["distance_a"], row["distance_b"]) == (pytest.approx(0.2), pytest.approx(0.4))
    expected = updated_beta(torch.ones(2).double(), torch.tensor([0.2, 0.4]).double(), torch.ones(2).bool(), 0.015)
    assert [row["balance_a"], row["balance_b"]] == pytest.approx(expected.tolist(), rel=1e-6)
    kept = {"balance_a": row["balance_a"], "balance_b": row["balance_b"]}
    assert balance.end_epoch(1, 300) == pytest.approx(kept), "the sums are gone, the weights stay"


@pytest.mark.parametrize(
    ("epoch", "epochs", "power"),
    [(0, 300, 1), (99, 300, 1), (100, 300, 2), (200, 300, 3), (299, 300, 3), (999, 1000, 3), (0, 1, 1)],
)
def test_rate_grows_as_published(epoch: int, epochs: int, power: int) -> None:
    balance = observed(STEPS)
    balance.end_epoch(epoch, epochs)
    expected = updated_beta(
        torch.ones(2).double(), torch.tensor([0.2, 0.4]).double(), torch.ones(2).bool(), 0.01 * 1.5**power
    )
    assert balance.beta.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_warm_up_measures_only() -> None:
    balance = observed(STEPS)
    assert balance.end_epoch(0, 10, update=False)["distance_b"] == pytest.approx(0.4)
    assert balance.beta.tolist() == [1.0, 1.0]


def test_count_weights() -> None:
    balance = ModalityBalance(("a", "b", "c"), 0.01)
    assert balance.weights(CPU).count.tolist() == [1, 1, 1]
    balance.count_cases([(True, True, False), (True, False, False), (True, False, False), (True, False, False)])
    assert balance.weights(CPU).count.tolist() == [1, 4, 0]


def test_ranks_agree_on_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two ranks with a step each end up with what one rank with both steps has."""
    one = observed(STEPS)
    one.end_epoch(0, 3)
    ranks = [observed(STEPS[:1]), observed(STEPS[1:])]
    total = sum(rank._sums.clone() for rank in ranks)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.copy_(total))
    for rank in ranks:
        rank.end_epoch(0, 3)
        assert torch.allclose(rank.beta, one.beta)
    assert torch.equal(ranks[0].beta, ranks[1].beta)


def test_reduction_through_a_process_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        grouped = observed(STEPS)
        grouped.end_epoch(0, 3)
    finally:
        dist.destroy_process_group()
    alone = observed(STEPS)
    alone.end_epoch(0, 3)
    assert torch.equal(grouped.beta, alone.beta)


def test_state_round_trip_and_other_modalities() -> None:
    balance = observed(STEPS)
    balance.end_epoch(0, 3)
    other = ModalityBalance(("a", "b"), 0.01)
    other.load_state_dict(balance.state_dict())
    assert torch.equal(other.beta, balance.beta)
    renamed = ModalityBalance(("a", "c"), 0.01)
    renamed.load_state_dict(balance.state_dict())
    assert torch.equal(renamed.beta, balance.beta)
    with pytest.raises(ValueError, match=r"balances the modalities a, b, this training has a, b, c\. Use the plans"):
        ModalityBalance(("a", "b", "c"), 0.01).load_state_dict(balance.state_dict())


# --- trainer ----------------------------------------------------------------------------------------------------------
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "passion": lambda: dict(PASSION),
    "with_mgml": lambda: {"rebalancing": "passion"},
    "with_teacher_view": lambda: {"rebalancing": "passion", "teacher_augmentation": True},
    "random_masks": lambda: {**PASSION, "mask_sampling": "uniform_subset"},
}


def balance_of(trainer: Any) -> ModalityBalance:
    return trainer.learner.objective.terms["rebalancing"].balance


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_moves_every_weight(name: str, nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), OPTIONS[name]())
    trainer.initialize()
    trainer.current_epoch = 2  # past the warm-up
    before = {key: p.clone() for key, p in trainer.network.named_parameters()}
    batch = synthetic_batch(trainer)
    batch["available"] = torch.tensor([[True, False, True, True], [True, True, True, False]])
    batch["visible"] &= batch["available"]
    if trainer.options.sampling.mask_sampling == "fixed":
        batch["visible"] = batch["available"]
    result = trainer.train_step(batch)
    assert {"train_distillation", "train_prototype", "train_modality"} <= set(result)
    assert all(np.isfinite(value) for value in result.values())
    stuck = {key for key, p in trainer.network.named_parameters() if p.ndim > 1 and torch.equal(p, before[key])}
    assert stuck <= {"decoder.seg_layers.0.weight"}
    assert balance_of(trainer)._sums[1].tolist() == [2, 1, 2, 1]
    assert (balance_of(trainer)._sums[0] > 0).all()


def test_no_teacher_pass_where_it_would_see_what_the_student_sees(
    nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With MGML's terms on and nothing removed at random, L_CR is 0 and nothing else needs the pass."""
    trainer = make_trainer(
        nnUNetTrainerMGML, write_dataset(nnunet_folders), {"rebalancing": "passion", "mask_sampling": "fixed"}
    )
    trainer.initialize()
    assert trainer.options.value("consistency_weight") > 0
    monkeypatch.setattr(trainer.bare_network, "_decode_complete", lambda *_: pytest.fail("a teacher pass was run"))
    batch = synthetic_batch(trainer)
    batch["available"] = batch["visible"]
    result = trainer.train_step(batch)
    assert "train_consistency" not in result
    assert np.isfinite(result["loss"])


@pytest.mark.parametrize("layout", ["2d", "labels", "ignore", "no_deep_supervision"])
def test_layouts(layout: str, nnunet_folders: Path) -> None:
    dataset_json = {**BRATS_JSON, "labels": dict(BRATS_JSON["labels"])}
    if layout == "labels":
        dataset_json["labels"] = {"background": 0, "edema": 1, "core": 2, "enhancing": 3}
        del dataset_json["regions_class_order"]
    if layout == "ignore":
        dataset_json["labels"]["ignore"] = 4
    plans_dict = plans(patch=(16, 16)) if layout == "2d" else plans()
    write_dataset(nnunet_folders, dataset_json, plans_dict=plans_dict)
    trainer = make_trainer(nnUNetTrainerMGML, plans_dict, {"rebalancing": "passion"}, dataset_json)
    trainer.enable_deep_supervision = layout != "no_deep_supervision"
    trainer.initialize()
    trainer.current_epoch, trainer.enable_deep_supervision = 2, True
    batch = synthetic_batch(trainer)
    if layout == "no_deep_supervision":
        batch["target"] = batch["target"][0]
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_a_run_logs_the_weights_and_resumes_exactly(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans_dict = write_dataset(nnunet_folders, absent={"case_1": 3})
    options = {**PASSION, "save_every": 1, "rebalancing_rate": 0.5}
    whole = make_trainer(nnUNetTrainerMGML, plans_dict, options)
    whole.run_training()
    assert balance_of(whole).count_weights.tolist() == [1, 1, 1, 2]
    rows = read_log(Path(whole.output_folder) / LOG_NAME)
    for name in CHANNELS:
        assert rows[-1][f"balance_{name}"] == pytest.approx(float(balance_of(whole).beta[CHANNELS.index(name)]))
        assert rows[0][f"distance_{name}"] > 0
    assert balance_of(whole).beta.square().mean().item() == pytest.approx(1)
    assert not torch.allclose(balance_of(whole).beta, torch.ones(4).double())
    assert {"train_distillation", "train_prototype"} <= set(rows[-1])

    monkeypatch.setenv("nnUNet_results", str(nnunet_folders / "again"))
    first = make_trainer(nnUNetTrainerMGML, plans_dict, options)
    run_until_epoch(first, 2, monkeypatch)
    second = make_trainer(nnUNetTrainerMGML, plans_dict, options, resume=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    assert torch.equal(balance_of(second).beta, balance_of(first).beta)
    second.run_training()
    assert torch.equal(balance_of(second).beta, balance_of(whole).beta)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value), name

    other = make_trainer(nnUNetTrainerMGML, plans_dict, {**options, "rebalancing": "none"})
    with pytest.raises(ValueError, match=r"trained with rebalancing=passion, this trainer has rebalancing=none"):
        other.load_checkpoint(str(Path(second.output_folder) / "checkpoint_final.pth"))


def test_a_checkpoint_without_balance_is_refused(nnunet_folders: Path) -> None:
    plans_dict = write_dataset(nnunet_folders)
    plain = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1})
    plain.run_training()
    checkpoint = str(Path(plain.output_folder) / "checkpoint_final.pth")
    assert set(torch.load(checkpoint, weights_only=False)["mgml"]) == {"meta_network", "meta_optimizer"}
    other = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1, "rebalancing": "passion"})
    with pytest.raises(ValueError, match=r"trained with rebalancing=none, this trainer has rebalancing=passion"):
        other.load_checkpoint(checkpoint)


def test_one_more_teacher_pass_only_where_modalities_are_removed(nnunet_folders: Path) -> None:
    plans_dict = write_dataset(nnunet_folders)

    def needs_teacher(options: dict[str, Any]) -> bool:
        trainer = make_trainer(nnUNetTrainerMGML, plans_dict, options)
        trainer.initialize()
        return trainer.learner.objective.needs.complete != "no"

    needs = {name: needs_teacher(options()) for name, options in OPTIONS.items()}
    assert needs == {"passion": False, "with_mgml": True, "with_teacher_view": True, "random_masks": True}
    assert needs_teacher({})
    assert not needs_teacher({"consistency_weight": 0.0, "complete_view_weight": 0.0})
