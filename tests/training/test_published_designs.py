"""The trainers named after the published methods are what docs/fusion.md says they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from builders import make_trainer, plans, write_dataset

from nnunetv2_mgml.commands.plan import make_plans
from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.plans.options import PLANS_KEY, MGMLConfig, parse_assignments
from nnunetv2_mgml.training import TRAINERS, nnUNetTrainerMGML, published_designs
from nnunetv2_mgml.training.run_notes import run_notes
from nnunetv2_mgml.training.variants import nnUNetTrainerMGML_baseline

NAMED = {name: trainer for name, trainer in TRAINERS.items() if trainer.__module__ == published_designs.__name__}
PLANNED: list[dict[str, Any]] = [
    {},
    {"fusion": "sfusion", "fusion_options": {"depth": 2, "grid": 4}},
    {"fusion": "m2ftrans", "fusion_options": {"depth": 2}},
    {"fusion": "mmformer", "fusion_options": {"depth": 2}},
    {"fusion": "imfuse", "fusion_options": {"d_state": 8}},
    {"fusion": "uhved", "fusion_options": {"kl_weight": 0.5}},
    {"fusion": "region_aware", "fusion_options": {"full_resolution_regions": False}},
    {"fusion": "hemis"},
]
"""Plans that a trainer may be started on."""


def documented() -> dict[str, tuple[bool, dict[str, Any]]]:
    """Trainer -> (with MGML, what ``mgml plan --set`` is given), read off the table."""
    text = (Path(__file__).parents[2] / "docs" / "fusion.md").read_text()
    rows = re.findall(r"^\| `\w+` \| `(nnUNetTrainer\w+)` \| `(nnUNetTrainer\w+)` \| `(.+)` \|$", text, re.MULTILINE)
    return {
        name: (mgml, parse_assignments(shlex.split(setting)))
        for *names, setting in rows
        for mgml, name in enumerate(names)
    }


def test_every_trainer_is_in_the_table() -> None:
    assert set(documented()) == set(NAMED)
    assert NAMED


@pytest.mark.parametrize("planned", PLANNED, ids=lambda options: options.get("fusion", "stock"))
@pytest.mark.parametrize("name", NAMED)
def test_a_trainer_equals_the_plans_it_is_said_to_equal(name: str, planned: dict[str, Any]) -> None:
    """On plans of any design; ``fusion_options`` count where those plans have the trainer's own design."""
    mgml, setting = documented()[name]
    stock = nnUNetTrainerMGML if mgml else nnUNetTrainerMGML_baseline
    setting = {**setting, **({} if mgml else fusion_designs()[setting["fusion"]].published_alone)}
    if planned.get("fusion") == setting["fusion"]:
        setting = {
            **setting,
            "fusion_options": {**setting.get("fusion_options", {}), **planned.get("fusion_options", {})},
        }
    other = {"num_epochs": 7, "width_factor": 0.25, **planned}
    equal = make_plans(plans(), {"num_epochs": 7, "width_factor": 0.25, **setting}, ["3d_fullres"], "P", ("t1", "t2"))
    config = NAMED[name].resolve_config({PLANS_KEY: {"config": other}})
    assert config == stock.resolve_config(equal)
    fusion_designs()[config.fusion].take_options(config.fusion_options)
    assert NAMED[name].resolve_config({PLANS_KEY: {"config": config.as_dict()}}) == config  # what inference does


def test_the_log_names_dropped_options(nnunet_folders: Path) -> None:
    options = {"fusion": "sfusion", "fusion_options": {"depth": 2, "grid": 4}}
    trainer = make_trainer(published_designs.nnUNetTrainermmFormer, write_dataset(nnunet_folders), options)
    trainer.initialize()
    log = Path(trainer.log_file).read_text()
    assert "{'depth': 2, 'grid': 4} were set for sfusion and are not used" in log
    assert log.count("not used") == 1


def test_notes_only_where_there_is_something_to_say() -> None:
    planned = MGMLConfig(fusion="mmformer", fusion_options={"depth": 2}, seed=3)
    assert run_notes("T", planned, {"fusion": "mmformer"}, 0) == []
    assert run_notes("T", planned, {"soft_label": "none"}, 0) == []
    (note,) = run_notes("T", planned, {}, 4)
    assert note.startswith("seed=3: exact repetition needs nnUNet_n_proc_DA=0")
    assert run_notes("T", MGMLConfig(), {"fusion": "mean"}, 4) == []


@pytest.mark.parametrize("name", NAMED)
def test_a_model_keeps_the_parts_it_was_trained_with(name: str) -> None:
    """What version 0.1.0 stored beside a model of this name: no published parts, no revision, other weights."""
    fixed = NAMED[name].config_overrides
    before = MGMLConfig(fusion=fixed["fusion"], soft_label="none", consistency_weight=0.0).as_dict()
    del before["fusion_revision"], before["network_form"]
    stored = {PLANS_KEY: {"version": "0.1.0", "config": before, "channels": ["t1", "t2"], "num_classes": 4}}
    config = NAMED[name].resolve_config(stored)
    assert config == MGMLConfig(**before, fusion_revision=1)
    written_by_plan = {PLANS_KEY: {key: value for key, value in stored[PLANS_KEY].items() if key != "num_classes"}}
    resolved = NAMED[name].resolve_config(written_by_plan)
    assert resolved.fusion_options == fixed.get("fusion_options", {})
    assert resolved.fusion_revision == 1
