from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import BRATS_JSON, configuration, make_trainer, plans, write_dataset
from fusion_cases import own_designs
from loss_cases import meta_network_of
from training_cases import synthetic_batch

from nnunetv2_mgml.dataloading.loader import visible_modalities
from nnunetv2_mgml.network.conditioned_unet import ConditionedUNet
from nnunetv2_mgml.network.subset_module import zero_absent
from nnunetv2_mgml.training import TRAINERS, nnUNetTrainerMGML, validation
from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log, region_names
from nnunetv2_mgml.training.validation import validate_subsets
from nnunetv2_mgml.training.variants import (
    nnUNetTrainerMGML_baseline,
    nnUNetTrainerMGML_fixedSoftLabels,
    nnUNetTrainerMGML_noConsistency,
    nnUNetTrainerMGML_noMetaAMF,
    nnUNetTrainerMGML_paperTerms,
    nnUNetTrainerModalityDropout,
    nnUNetTrainerModalityDropout_conditional,
)
from nnunetv2_mgml.workflows.evaluate import ModelRequest

VARIANTS = (
    nnUNetTrainerMGML,
    nnUNetTrainerMGML_baseline,
    nnUNetTrainerMGML_fixedSoftLabels,
    nnUNetTrainerMGML_noConsistency,
    nnUNetTrainerMGML_noMetaAMF,
    nnUNetTrainerMGML_paperTerms,
)
LABELS_JSON: dict[str, Any] = {**BRATS_JSON, "labels": {"background": 0, "edema": 1, "core": 2, "enhancing": 3}}
LABELS_JSON.pop("regions_class_order")


class RecordingLogger:
    """Stands for Weights & Biases: the methods nnU-Net's `MetaLogger` calls."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, float, int]] = []
        self.config: dict[str, Any] = {}

    def log(self, key: str, value: float, step: int) -> None:
        self.logged.append((key, value, step))

    def log_summary(self, key: str, value: Any) -> None: ...

    def update_config(self, config: dict[str, Any]) -> None:
        self.config.update(config)


def test_a_cpu_gets_no_more_threads_than_the_process_may_use(
    nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net's command starts one for every CPU of the machine before it builds the trainer."""
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders))
    assert threads == [1]


def test_a_run_writes_what_a_user_looks_for(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders, absent={"case_1": 3}))
    logger = RecordingLogger()
    trainer.logger.loggers.append(logger)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    assert {"checkpoint_best.pth", "checkpoint_final.pth", "progress.png", "mgml_progress.png", LOG_NAME} <= {
        path.name for path in folder.iterdir()
    }
    assert not list(folder.glob("*.tmp"))
    rows = read_log(folder / LOG_NAME)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    terms = ("segmentation", "modality", "soft_label", "consistency", "meta", "total")
    dice = ("whole_tumor", "tumor_core", "enhancing_tumor", "mean")
    needed = {
        "lr",
        "t1",
        "t2",
        "w_f",
        "beta",
        "alpha",
        "val_loss",
        "seconds",
        *(f"train_{t}" for t in terms),
        *(f"pseudo_dice_{d}" for d in dice),
    }
    assert needed <= set(rows[-1])
    assert all(np.isfinite(row[name]) for row in rows for name in ("train_total", "train_soft_label", "w_f", "beta"))
    assert "1 of 2 training cases are incomplete" in Path(trainer.log_file).read_text()
    told = {(key, step): value for key, value, step in logger.logged if key.startswith("mgml/")}
    assert told == {(f"mgml/{key}", int(row["epoch"])): row[key] for row in rows for key in row if key != "epoch"}
    assert logger.config["mgml"]["fusion"] == "concat"


@pytest.mark.parametrize("cls", VARIANTS)
def test_variants_fix_their_options(cls: type[nnUNetTrainerMGML], nnunet_folders: Path) -> None:
    trainer = make_trainer(cls, write_dataset(nnunet_folders))
    trainer.initialize()
    result = trainer.train_step(synthetic_batch(trainer))
    assert np.isfinite(result["loss"])
    expected = {  # soft label, consistency, loss on the complete view, MetaNetwork
        nnUNetTrainerMGML: (True, True, True, True),
        nnUNetTrainerMGML_baseline: (False, False, False, False),
        nnUNetTrainerMGML_fixedSoftLabels: (True, False, False, False),
        nnUNetTrainerMGML_noConsistency: (True, False, False, True),
        nnUNetTrainerMGML_noMetaAMF: (False, True, False, False),
        nnUNetTrainerMGML_paperTerms: (True, True, False, True),
    }[cls]
    assert (
        "train_soft_label" in result,
        "train_consistency" in result,
        "train_complete" in result,
        meta_network_of(trainer.learner.objective) is not None,
    ) == expected


def test_every_fusion_design_has_a_baseline_and_an_mgml_trainer() -> None:
    by_design: dict[str, set[bool]] = {}
    for trainer in TRAINERS.values():
        if issubclass(trainer, nnUNetTrainerMGML) and "fusion" in trainer.config_overrides:
            resolved = trainer.resolve_options({})
            with_mgml = resolved.value("soft_label") != "none" and resolved.value("consistency_weight") > 0
            by_design.setdefault(resolved.network.fusion, set()).add(with_mgml)
    published = {name for name, design in own_designs().items() if design.trainer}
    assert by_design == {design: {True, False} for design in published}


@pytest.mark.parametrize(
    "layout",
    [
        "2d",
        "residual",
        "anisotropic",
        "labels",
        "ignore",
        "label_ignore",
        "cascade",
        "teacher_view",
        "bfloat16",
        "adam",
        "no_deep_supervision",
    ],
)
def test_layouts_train(layout: str, nnunet_folders: Path) -> None:
    """One step on each kind of dataset and plan: finite loss, and every weight of the network moves."""
    dataset_json, options = copy.deepcopy(BRATS_JSON), {}
    plans_dict = plans()
    if layout == "2d":
        plans_dict = plans(patch=(16, 16))
    elif layout == "residual":
        plans_dict = plans(residual=True)
    elif layout == "anisotropic":
        plans_dict = plans(
            patch=(6, 16, 16), strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]]
        )
    elif layout in ("labels", "label_ignore"):
        dataset_json = copy.deepcopy(LABELS_JSON)
    elif layout == "teacher_view":
        options = {"teacher_augmentation": True}
    elif layout == "bfloat16":
        options = {"cpu_bfloat16": True}
    elif layout == "adam":
        options = {"optimizer": "adam", "initial_lr": 2e-4}
    if layout in ("ignore", "label_ignore"):
        dataset_json["labels"]["ignore"] = 4
    if layout == "cascade":
        (config,) = plans_dict["configurations"].values()
        plans_dict["configurations"] = {
            "3d_cascade_fullres": {**config, "previous_stage": "3d_lowres"},
            "3d_lowres": {**configuration(), "next_stage": "3d_cascade_fullres"},
        }
    write_dataset(
        nnunet_folders,
        plans_dict=plans() if layout == "cascade" else copy.deepcopy(plans_dict),
        dataset_json=dataset_json,
    )
    trainer = make_trainer(nnUNetTrainerMGML, plans_dict, options, dataset_json)
    if layout == "no_deep_supervision":
        trainer.enable_deep_supervision = False
    trainer.initialize()
    trainer.current_epoch = 2  # past the warm-up
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    if layout == "no_deep_supervision":
        trainer.enable_deep_supervision = True
        batch = synthetic_batch(trainer)
        trainer.enable_deep_supervision = False
        batch["target"] = batch["target"][0]
    else:
        batch = synthetic_batch(trainer)
    # nnU-Net's residual blocks begin with a scale of 0, behind which only weight decay moves what is not 0 itself
    for _ in range(2 if layout == "residual" else 1):
        assert np.isfinite(trainer.train_step(batch)["loss"])
    weights = [name for name, p in trainer.network.named_parameters() if p.ndim > 1]
    untrained = {"decoder.seg_layers.0.weight"}  # nnU-Net's lowest deep supervision output has weight 0
    assert {
        name for name in weights if torch.equal(dict(trainer.network.named_parameters())[name], before[name])
    } <= untrained
    trainer.network.eval()
    result = trainer.validation_step(batch)
    assert np.isfinite(result["loss"])
    assert len(result["tp_hard"]) == 3


def test_validation_sees_only_the_subset(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders))
    trainer.initialize()
    trainer.network.eval()
    losses = []
    for content in (0.0, 100.0):
        batch = synthetic_batch(trainer)
        batch["data"][0, 1] = content
        batch["data"][1, [0, 2, 3]] = content
        with torch.no_grad():
            losses.append(trainer.validation_step(batch)["loss"])
    assert losses[0] == losses[1]
    assert trainer.bare_network._visible is None


def test_modality_dropout_trains_the_stock_network_on_visible_channels(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerModalityDropout, write_dataset(nnunet_folders), {"num_epochs": 1})
    trainer.run_training()
    assert type(trainer.network).__name__ == "PlainConvUNet"
    assert np.isfinite(read_log(Path(trainer.output_folder) / LOG_NAME)[0]["train_total"])
    x, mask = torch.randn(2, 5, 3, 3, 3), torch.tensor([[True, False], [False, True]])
    shown = zero_absent(x, mask)
    assert torch.equal(shown[0, 0], x[0, 0])
    assert not shown[0, 1].any()
    assert torch.equal(shown[:, 2:], x[:, 2:])


def test_a_case_is_validated_as_it_is_trained(nnunet_folders: Path) -> None:
    """Empty means zero, whatever normalisation made of the placeholder; what was announced is forgotten afterwards."""
    trainer = make_trainer(nnUNetTrainerModalityDropout, write_dataset(nnunet_folders))
    trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    network = trainer.network.eval()
    x = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    x[:, 2] = -3
    empty = x.clone()
    empty[:, 2] = 0
    with torch.no_grad():
        wanted, untouched = network(empty), network(x)
        assert not torch.equal(wanted, untouched)
        for subset, expected in (((True, True, False, True), wanted), ((True,) * 4, untouched), (None, untouched)):
            trainer.learner.announce(subset)
            assert torch.equal(network(x), expected)


def test_conditional_norms_learn_from_the_mask(nnunet_folders: Path) -> None:
    """Their parts per modality start at zero and get gradients; validation sees nothing of what is hidden."""
    trainer = make_trainer(
        nnUNetTrainerModalityDropout_conditional, write_dataset(nnunet_folders), {"num_epochs": 1, "seed": 1}
    )
    trainer.initialize()
    network = trainer.bare_network
    assert isinstance(network, ConditionedUNet)
    own = [parameter for name, parameter in network.named_parameters() if name.endswith("of_modalities")]
    assert own
    assert not any(parameter.any() for parameter in own)
    batch = synthetic_batch(trainer)
    visible = visible_modalities(batch)
    assert not visible.all()
    loss, _ = trainer.learner.loss(batch, trainer.progress)
    hidden = {**batch, "data": torch.where(visible[:, :, None, None, None], batch["data"], torch.nan)}
    assert torch.equal(loss, trainer.learner.loss(hidden, trainer.progress)[0])
    network.eval()
    with torch.no_grad():
        assert trainer.validation_step(batch)["loss"] == trainer.validation_step(hidden)["loss"]
    trainer.run_training()
    assert all(parameter.any() for parameter in own)
    assert np.isfinite(read_log(Path(trainer.output_folder) / LOG_NAME)[0]["train_total"])


@pytest.mark.parametrize("cls", [nnUNetTrainerMGML, nnUNetTrainerModalityDropout_conditional])
def test_final_validation_tells_the_network_what_each_case_has(
    cls: type[nnUNetTrainerMGML], nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(cls, write_dataset(nnunet_folders, absent={"case_1": 2}), {"num_epochs": 1})
    trainer.run_training()
    told: list[Any] = []
    original = trainer.bare_network.set_visible
    monkeypatch.setattr(trainer.bare_network, "set_visible", lambda subset: (told.append(subset), original(subset)))
    trainer.perform_actual_validation()
    assert [subset for subset in told if subset is not None] == [(True,) * 4, (True, True, False, True)]
    assert told[-1] is None
    summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"(1, 2, 3)", "(2, 3)", "(3,)"}


def test_one_modality_is_refused_with_the_reason(nnunet_folders: Path) -> None:
    dataset_json = {**BRATS_JSON, "channel_names": {"0": "T1"}}
    plans_dict = write_dataset(nnunet_folders, dataset_json, plans_dict=plans(modalities=1))
    trainer = make_trainer(nnUNetTrainerMGML, plans_dict, dataset_json=dataset_json)
    with pytest.raises(ValueError, match=r"needs at least two modalities.*Use nnUNetTrainer"):
        trainer.initialize()


def test_plans_no_trainer_has_completed_are_refused() -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans())
    with pytest.raises(ValueError, match="num_classes"):
        nnUNetTrainerMGML.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 4, 3)


def test_nnunets_own_names_are_options(nnunet_folders: Path) -> None:
    options = {
        "num_epochs": 7,
        "num_iterations_per_epoch": 11,
        "num_val_iterations_per_epoch": 3,
        "initial_lr": 0.02,
        "weight_decay": 1e-3,
        "oversample_foreground_percent": 0.5,
        "save_every": 4,
    }
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), options)
    assert {name: getattr(trainer, name) for name in options} == options
    stock = make_trainer(nnUNetTrainerMGML, plans(), dict.fromkeys(options))
    assert (stock.num_epochs, stock.num_iterations_per_epoch, stock.initial_lr) == (1000, 250, 0.01)


def test_both_optimisers_under_one_gradient_scaler(nnunet_folders: Path) -> None:
    """A finite step moves network and MetaNetwork; a step with infinite gradients moves neither."""
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders))
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.current_epoch = 2

    def weights() -> list[torch.Tensor]:
        return [
            p.detach().clone()
            for module in (trainer.network, meta_network_of(trainer.learner.objective))
            for p in module.parameters()
        ]

    before = weights()
    trainer.train_step(synthetic_batch(trainer))
    after = weights()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.ndim > 1 and len(a) > 3)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    trainer.train_step(synthetic_batch(trainer))
    assert all(torch.equal(a, b) for a, b in zip(after, weights(), strict=True))


def test_a_table_over_subsets_from_preprocessed_data_or_why_there_is_none(
    nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnUNet_raw is not on the machine that trains; one case lacks T2."""
    here = dict.fromkeys(("num_processes", "num_processes_preprocessing", "num_processes_export"), 0)
    monkeypatch.setattr(validation, "ModelRequest", lambda **fields: ModelRequest(**{**fields, **here}))
    trainer = make_trainer(
        nnUNetTrainerMGML, write_dataset(nnunet_folders, absent={"case_1": 2}), {"num_epochs": 1, "width_factor": 0.5}
    )
    trainer.run_training()
    assert "quality to expect per subset" in validate_subsets(trainer, trainer.weights_file)
    summary = json.loads(Path(trainer.output_folder, "subset_validation", "summary.json").read_text())
    assert len(summary["subsets"]) == 15
    assert all("t2" in subset for subset in summary["not_evaluated"]["case_1"])
    assert len(summary["not_evaluated"]["case_1"]) == 8
    report = json.loads(Path(trainer.output_folder_base, "subset_report.json").read_text())
    assert report["shared_preprocessing"] is True
    assert report["subsets"]["t2"]["whole_tumor"]["n"] == 1
    shutil.rmtree(nnunet_folders / "preprocessed" / "Dataset900_Phantom" / "gt_segmentations")
    requests: list[ModelRequest] = []
    trainer.options = trainer.options.updated({"cpu_bfloat16": True})
    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate_model", lambda request: requests.append(request) or 1 / 0)
        for device in ("cuda", "cpu"):
            trainer.device = torch.device(device)
            validate_subsets(trainer, trainer.weights_file)
    assert [request.cpu_bfloat16 for request in requests] == [False, True], "it is for the CPU alone"
    said = validate_subsets(trainer, trainer.weights_file)
    assert said.startswith("No table over all modality subsets:")
    assert "gt_segmentations" in said
    assert "nnU-Net's own validation above is complete" in said
    assert "no checkpoint" in validate_subsets(trainer, None)
    trainer.fold = "all"
    assert "fold 'all'" in validate_subsets(trainer, "checkpoint_final.pth")


def names(trainer: nnUNetTrainerMGML) -> list[str]:
    return region_names(trainer.dataset_json, trainer.label_manager)


def test_log_names_labels_in_the_order_of_pseudo_dice(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without regions nnU-Net's pseudo Dice goes by label value, with regions by the order of dataset.json."""
    labels = {"background": 0, "enhancing": 3, "edema": 1, "core": [2], "ignore": 4}
    trainer = make_trainer(
        nnUNetTrainerMGML,
        write_dataset(nnunet_folders, {**LABELS_JSON, "labels": labels}),
        dataset_json={**LABELS_JSON, "labels": labels},
    )
    assert names(trainer) == ["edema", "core", "enhancing"]
    trainer.initialize()
    trainer.network.eval()
    batch = synthetic_batch(trainer)
    target = batch["target"][0]
    only_core = torch.full((2, 4, *target.shape[2:]), -9.0)
    only_core[:, 2] = 9.0
    monkeypatch.setattr(
        trainer.bare_network,
        "forward",
        lambda *_, **__: [only_core[..., : t.shape[2], : t.shape[3], : t.shape[4]] for t in batch["target"]],
    )
    found = trainer.validation_step(batch)["tp_hard"]
    assert dict(zip(names(trainer), found > 0, strict=True)) == {
        "edema": False,
        "core": True,
        "enhancing": False,
    }
    regions = {"background": 0, "tumor_core": [2, 3], "whole_tumor": [1, 2, 3], "enhancing_tumor": [3]}
    other = make_trainer(nnUNetTrainerMGML, plans(), dataset_json={**BRATS_JSON, "labels": regions})
    assert names(other) == ["tumor_core", "whole_tumor", "enhancing_tumor"]


def test_warm_up_is_linear(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 20})
    trainer.initialize()
    ramps = []
    for epoch, step in ((0, 0), (0, 1), (1, 0), (2, 0), (19, 1)):
        trainer.current_epoch, trainer.steps_in_epoch = epoch, step
        ramps.append(trainer.learner.objective.ramp(trainer.progress))
    assert ramps == [0.0, 0.25, 0.5, 1.0, 1.0]
