"""The registry of terms, what they ask of the network, and terms of other packages as docs/terms.md teaches them."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_trainer, network, options_with, write_dataset
from loss_cases import bools, objective_of
from training_cases import run_until_epoch, synthetic_batch

from nnunetv2_mgml.objective import (
    Objective,
    Options,
    Term,
    base,
    find_term,
    loss_terms,
    random_subsets,
    register,
)
from nnunetv2_mgml.objective.terms.consistency import ConsistencyOptions
from nnunetv2_mgml.plans.options import PLANS_KEY, OptionGroup, option
from nnunetv2_mgml.training import nnUNetTrainerMGML

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "terms.md").read_text(encoding="utf-8")


def recipe() -> str:
    """The term that docs/terms.md tells the reader to write."""
    (code,) = re.findall(r"```python\n(\"\"\"Agreement.*?)```", DOCS, re.DOTALL)
    return code


def install(folder: Path, package: str, entry_points: dict[str, str], code: str) -> None:
    """Write a module and the metadata of an installed package around it."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{base.GROUP}]", *lines, ""]))
    (folder / f"{package.replace('-', '_')}.py").write_text(code)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder on the path, before anybody asked for the terms of other packages."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    own = {key: term for key, term in base._REGISTRY.terms.items() if term.__module__.startswith("nnunetv2_mgml.")}
    monkeypatch.setattr(base, "_REGISTRY", base._Registry(own, list(base._REGISTRY.groups)))
    importlib.invalidate_caches()
    for module in ("my_term", "broken_term"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield folder
    for module in ("my_term", "broken_term"):
        sys.modules.pop(module, None)


def test_terms_in_the_order_of_the_docs() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE)
    own = [name for name, term in loss_terms().items() if term.__module__.startswith("nnunetv2_mgml.")]
    assert rows == own
    assert own.index("rebalancing") < own.index("modality_decoder"), "whose modalities it weighs"
    assert all(term.summary for term in loss_terms().values())


def test_the_documented_term_as_a_package_of_its_own(
    fresh: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found, planned, trained and resumed with, without a change in ours."""
    install(fresh, "my-term", {"agreement": "my_term:Agreement"}, recipe())
    assert "agreement" in loss_terms()
    assert "agreement_weight" in Options.names()
    plans_dict = write_dataset(nnunet_folders)
    options = {"agreement_weight": 0.5, "save_every": 1, "num_epochs": 2}
    whole = make_trainer(nnUNetTrainerMGML, plans_dict, options)
    whole.run_training()
    assert whole.learner.objective.needs.subsets == 2
    assert whole.training_log.rows[-1]["train_agreement"] > 0
    assert whole.plans_manager.plans[PLANS_KEY]["config"]["agreement_weight"] == 0.5

    monkeypatch.setenv("nnUNet_results", str(nnunet_folders / "again"))
    first = make_trainer(nnUNetTrainerMGML, plans_dict, options)
    run_until_epoch(first, 1, monkeypatch)
    second = make_trainer(nnUNetTrainerMGML, plans_dict, options, resume=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    second.run_training()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value), name


def test_the_documented_term_leaves_the_others_alone(fresh: Path, nnunet_folders: Path) -> None:
    install(fresh, "my-term", {"agreement": "my_term:Agreement"}, recipe())
    plans_dict = write_dataset(nnunet_folders)
    steps = []
    for options in ({}, {"agreement_weight": 0.5}):
        trainer = make_trainer(nnUNetTrainerMGML, plans_dict, options)
        trainer.initialize()
        trainer.current_epoch = 2
        torch.manual_seed(3)
        steps.append(trainer.train_step(synthetic_batch(trainer)))
    plain, more = steps
    assert {name for name in more if name not in plain} == {"train_agreement"}
    assert more["train_segmentation"] == plain["train_segmentation"]
    assert more["train_consistency"] == plain["train_consistency"]


def test_plans_that_use_a_missing_package_say_so() -> None:
    plans = {PLANS_KEY: {"version": "0.2.0", "config": {"agreement_weight": 0.1}}}
    with pytest.raises(ValueError, match=r"Unknown option agreement_weight\..*loss term of another package"):
        Options.from_plans(plans)


def test_the_documented_metadata_names_the_term() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    assert f'[project.entry-points."{base.GROUP}"]\nagreement = "my_term:Agreement"\n' in text


BROKEN = """
from dataclasses import dataclass
from nnunetv2_mgml import OptionGroup, Term, option, register_term

@dataclass(frozen=True)
class Taken(OptionGroup):
    {option}: float = option(0.0, "whatever")

class Broken(Term):
    name = {name!r}
    option_group = Taken
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import a_module_nobody_has", "ModuleNotFoundError: No module named 'a_module_nobody_has'"),
        ("Broken = 3", "TypeError: 3 is not a subclass of Term"),
        (
            BROKEN.format(option="mine", name="consistency"),
            "ValueError: Loss term 'consistency' (ours) is already registered by Consistency",
        ),
        (
            BROKEN.format(option="temperature", name="mine"),
            "ValueError: Option temperature of Taken is already declared by SharedOptions",
        ),
    ],
)
def test_a_broken_package_is_named_and_the_others_work(
    code: str, reason: str, fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(fresh, "broken-term", {"broken": "broken_term:Broken"}, code)
    install(fresh, "my-term", {"agreement": "my_term:Agreement"}, recipe())
    expected = f"Loss term 'broken' of broken-term cannot be used: {reason}"
    with caplog.at_level(logging.WARNING):
        assert "agreement" in loss_terms()
        loss_terms()
    (record,) = [record for record in caplog.records if "broken" in record.message]
    assert record.message.startswith(expected)
    with pytest.raises(ValueError, match=rf"Unknown loss term 'broken'\. Allowed: .*{re.escape(expected)}"):
        find_term("broken")


def test_info_lists_its_options_in_a_new_process(tmp_path: Path) -> None:
    install(tmp_path, "my-term", {"agreement": "my_term:Agreement"}, recipe())
    out = subprocess.run(
        [sys.executable, "-m", "nnunetv2_mgml.commands.main", "info", "--options"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    ).stdout
    assert "agreement_weight = 0.0\n" in out


def test_registration_refuses_what_has_no_name() -> None:
    with pytest.raises(ValueError, match="needs a class attribute 'name'"):
        register(type("Nameless", (Term,), {}))


def test_a_checkpoint_with_the_state_of_other_terms_is_refused() -> None:
    state = objective_of(options_with()).training_state()
    other = objective_of(options_with(soft_label="none"))
    with pytest.raises(
        ValueError, match=r"trained with soft_label=meta_amf, this trainer has soft_label=none; use the same plans"
    ):
        other.load_training_state(state, options_with())
    assert other.training_state() == {"meta_network": None, "meta_optimizer": None}


@pytest.mark.parametrize(
    "changes",
    [{"meta_hidden": 32}, {"sharpness_max": 10.0}, {"meta_form": "published", "reading": "reference"}],
    ids=["another shape", "another range", "another optimiser"],
)
def test_a_meta_network_that_means_something_else_is_refused(changes: dict[str, Any]) -> None:
    state = objective_of(options_with()).training_state()
    with pytest.raises(ValueError, match=rf"this trainer has .*{next(iter(changes))}={next(iter(changes.values()))}"):
        objective_of(options_with(**changes)).load_training_state(state, options_with())
    same = objective_of(options_with(meta_lr=0.5))
    same.load_training_state(state, options_with())
    assert torch.equal(
        same.training_state()["meta_network"]["layers.0.weight"], state["meta_network"]["layers.0.weight"]
    )


@dataclasses.dataclass(frozen=True)
class Extra(OptionGroup):
    extra: int = option(1, "an option of nobody")


def test_what_a_group_is_not_part_of_is_said() -> None:
    with pytest.raises(KeyError, match="Extra belongs to no registered loss term"):
        Options().objective[Extra]
    assert Options().objective[ConsistencyOptions].consistency_weight == 0.03


@pytest.mark.parametrize("modalities", [2, 4, 7])
def test_random_subsets_are_uniform_and_follow_the_seed(modalities: int) -> None:
    available = bools(3, modalities, chance=0.6)
    torch.manual_seed(0)
    drawn = random_subsets(available, 4000)
    torch.manual_seed(0)
    assert torch.equal(drawn, random_subsets(available, 4000))
    assert drawn.shape == (3, 4000, modalities)
    assert drawn.any(2).all()
    assert not (drawn & ~available[:, None]).any()
    for sample, having in zip(drawn, available, strict=True):
        kinds, counts = sample.unique(dim=0, return_counts=True)
        choices = 2 ** int(having.sum()) - 1
        assert len(kinds) == choices
        assert counts.min() > 0.5 * 4000 / choices


def test_without_a_term_that_draws_nothing_is_drawn() -> None:
    objective: Objective = objective_of(options_with())
    torch.manual_seed(0)
    available = torch.ones(2, 4, dtype=torch.bool)
    assert objective.draw_view(available, available).subsets is None
    drawn: Any = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_further_subsets_compile_with_the_rest(fresh: Path) -> None:
    install(fresh, "my-term", {"agreement": "my_term:Agreement"}, recipe())
    options = options_with(agreement_weight=0.5, fusion="mean", width_factor=1.0)
    objective = objective_of(options)
    net = network(options)
    available = torch.ones(2, 4, dtype=torch.bool)
    view = objective.draw_view(torch.tensor([[True, False, True, True], [False, True, False, False]]), available)
    x = torch.randn(2, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        for found, expected in zip(
            compiled(x, view, objective.needs).subsets, net(x, view, objective.needs).subsets, strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
