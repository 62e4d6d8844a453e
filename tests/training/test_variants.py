"""Trainers made from fusion designs, ours and those of other packages, are what docs/fusion.md says they are."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY, make_trainer, options_with, plans, write_dataset
from fusion_cases import install, recipe
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.network.fusion.published import trainers_table
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.plans.presets import PAPER_LOSSES, REFERENCE_LOSSES
from nnunetv2_mgml.training import TRAINERS, nnUNetTrainerMGML, nnUNetTrainermmFormer
from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log
from nnunetv2_mgml.training.run_notes import run_notes
from nnunetv2_mgml.training.variants import nnUNetTrainerMGML_baseline
from nnunetv2_mgml.upstream.registration import EXT_DIR, EXT_VARIABLE
from nnunetv2_mgml.workflows.plan import make_plans

NAMED = {name: trainer for name, trainer in TRAINERS.items() if "fusion" in trainer.config_overrides}
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


def settings(name: str) -> dict[str, Any]:
    """What ``mgml plan --set`` would be given for a trainer's plans, by its design's attributes."""
    fusion = NAMED[name].resolve_options({}).network.fusion
    design = fusion_designs()[fusion]
    assert name.removeprefix("nnUNetTrainer").removesuffix("_MGML") == design.trainer
    alone = {} if name.endswith("_MGML") else design.published_alone
    published = {
        "network_form": "multi_encoder",
        "modality_decoder_scale": 0,
        "conditional_norms": False,
        "complete_every": 1,
        **design.published_options,
    }
    return copy.deepcopy({"fusion": fusion, **published, **alone})


def test_every_trainer_is_in_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "fusion.md").read_text()
    (found,) = re.findall(r"<!-- trainers -->\n(.*?)<!-- /trainers -->", text, re.DOTALL)
    own = {name: design for name, design in fusion_designs().items() if design.__module__.startswith("nnunetv2_mgml.")}
    assert found == trainers_table(own), "make it again: nnunetv2_mgml.network.fusion.published.trainers_table"
    assert set(re.findall(r"`(nnUNetTrainer\w+)`", found)) == set(NAMED)


@pytest.mark.parametrize("planned", PLANNED, ids=lambda options: options.get("fusion", "stock"))
@pytest.mark.parametrize("name", NAMED)
def test_a_trainer_equals_the_plans_it_is_said_to_equal(name: str, planned: dict[str, Any]) -> None:
    """On plans of any design; ``fusion_options`` count where those plans have the trainer's own design."""
    setting = settings(name)
    stock = nnUNetTrainerMGML if name.endswith("_MGML") else nnUNetTrainerMGML_baseline
    if planned.get("fusion") == setting["fusion"]:
        setting = {
            **setting,
            "fusion_options": {**setting.get("fusion_options", {}), **planned.get("fusion_options", {})},
        }
    other = {"num_epochs": 7, "width_factor": 0.25, **planned}
    equal = make_plans(plans(), {"num_epochs": 7, "width_factor": 0.25, **setting}, ["3d_fullres"], "P", ("t1", "t2"))
    config = NAMED[name].resolve_options({PLANS_KEY: {"config": other}})
    assert config == stock.resolve_options(equal)
    fusion_designs()[config.network.fusion].take_options(config.network.fusion_options)
    assert NAMED[name].resolve_options({PLANS_KEY: {"config": config.as_dict()}}) == config  # what inference does


@pytest.mark.parametrize("name", NAMED)
def test_another_total_than_the_publications_keeps_its_weights(name: str) -> None:
    """The presets of MGML's losses are what they say with these trainers too; PASSION's sum is not counted M times."""
    fixed = NAMED[name].config_overrides
    weights = ("modality_decoder_weight", "auxiliary_weight")
    for losses in (PAPER_LOSSES, REFERENCE_LOSSES):
        found = NAMED[name].resolve_options({PLANS_KEY: {"config": losses}})
        for weight in weights:
            absent = fixed.get(weight) == 0
            assert found.value(weight) == (0 if absent else losses[weight])
        assert NAMED[name].resolve_options({PLANS_KEY: {"config": found.as_dict()}}) == found
    passion = {"rebalancing": "passion", "mask_sampling": "fixed", "modality_decoder_weight": 1.0}
    found = NAMED[name].resolve_options({PLANS_KEY: {"config": passion}})
    assert found.value("modality_decoder_weight") == 1
    assert found.value("auxiliary_weight") == fixed.get("auxiliary_weight", 1)
    assert found.network.fusion == fixed["fusion"]


SAMPLINGS: list[dict[str, Any]] = [
    {"mask_sampling": "fixed", "rebalancing": "passion", "modality_decoder_weight": 1.0},
    {"mask_sampling": "bernoulli", "modality_missing_rate": {"t1": 0.2}},
    {"mask_sampling": "uniform_count"},
]


@pytest.mark.parametrize("planned", SAMPLINGS, ids=lambda options: options["mask_sampling"])
@pytest.mark.parametrize("name", NAMED)
def test_which_modalities_are_hidden_is_up_to_the_plans(name: str, planned: dict[str, Any]) -> None:
    """A trainer of a design trains with the sampling that plans set, and its log says nothing of it."""
    trainer, block = NAMED[name], {PLANS_KEY: {"config": planned}}
    found = trainer.resolve_options(block)
    assert {option: found.value(option) for option in planned} == planned
    assert trainer.resolve_options({PLANS_KEY: {"config": found.as_dict()}}) == found
    options = Options.from_plans(block)
    fixed = trainer.fixed_on(options)
    assert options.overridden(fixed) == found
    cascade = run_notes(name, options, fixed, 0, cascaded=True)
    assert [note[:7] for note in cascade] == ["WARNING"] * (planned["mask_sampling"] != "fixed")
    assert trainer.resolve_options({}).sampling.mask_sampling == trainer.config_overrides.get(
        "mask_sampling", "uniform_subset"
    )


def test_the_log_names_what_a_trainer_changes(nnunet_folders: Path) -> None:
    planned = {"mask_sampling": "fixed", "soft_label": "fixed", "consistency_weight": 0.1, "fusion": "mean"}
    trainer = make_trainer(TRAINERS["nnUNetTrainerHeMIS"], write_dataset(nnunet_folders), planned)
    assert trainer.options.sampling.mask_sampling == "fixed"
    (line,) = [line for line in Path(trainer.log_file).read_text().splitlines() if " fixes " in line]
    for change in (
        "fusion=hemis (the plans have mean)",
        "soft_label=none (the plans have fixed)",
        "consistency_weight=0.0 (the plans have 0.1)",
    ):
        assert change in line
    assert line.count("the plans have") == 3


def test_a_sampling_that_a_trainer_of_ones_own_fixes_is_named() -> None:
    """And the rates of bernoulli go with it, instead of an error about a sampling that nobody chose."""

    class Mine(TRAINERS["nnUNetTrainerHeMIS"]):
        config_overrides = {"mask_sampling": "fixed"}

    class Other(nnUNetTrainerMGML):
        config_overrides = {"mask_sampling": "uniform_count"}

    planned = options_with(mask_sampling="bernoulli", modality_missing_rate={"t1": 0.2})
    for trainer, fixed in ((Mine, Mine.fixed_on(planned)), (Other, Other.config_overrides)):
        found = trainer.resolve_options({PLANS_KEY: {"config": planned.as_dict()}})
        sampling = trainer.config_overrides["mask_sampling"]
        assert found.sampling.mask_sampling == sampling
        assert found.sampling.modality_missing_rate == {}
        (note,) = run_notes("T", planned, fixed, 0)
        assert f"T fixes mask_sampling={sampling} (the plans have bernoulli)" in note
        assert "modality_missing_rate={} (the plans have {'t1': 0.2})" in note
    (changed, cascade) = run_notes("T", options_with(mask_sampling="fixed"), Other.config_overrides, 0, cascaded=True)
    assert changed == "T fixes mask_sampling=uniform_count (the plans have fixed)"
    assert cascade.startswith("WARNING: the previous stage's label maps")
    assert run_notes("T", Options(), {"mask_sampling": "fixed"}, 0, cascaded=True) == []


def test_a_model_keeps_the_options_it_was_trained_with() -> None:
    """Its plans.json says what its trainer fixed then, which may be less than what the same trainer fixes today."""
    trainer = TRAINERS["nnUNetTrainerM2FTrans"]
    assert trainer.resolve_options({}).network.fusion_options["channel_attention"]
    then = options_with(fusion="m2ftrans", soft_label="none", modality_decoder_weight=0.7, width_factor=1.0)
    stored = {**plans(), PLANS_KEY: {"version": "0.1.0", "config": then.as_dict(), "num_classes": 4}}
    manager = PlansManager(stored)
    network = trainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 4, 3, False)
    assert not network.fusion.options["channel_attention"]
    assert not network.fusion.options["pyramid_heads"]


def test_trainers_are_importable_by_name() -> None:
    from nnunetv2_mgml import training
    from nnunetv2_mgml.training import nnUNetTrainerRFNet, nnUNetTrainerRFNet_MGML, variants

    assert nnUNetTrainerRFNet is TRAINERS["nnUNetTrainerRFNet"] is variants.nnUNetTrainerRFNet
    assert not issubclass(nnUNetTrainerRFNet_MGML, nnUNetTrainerRFNet)
    assert "RFNet" in (nnUNetTrainerRFNet.__doc__ or "")
    with pytest.raises(AttributeError, match="nnUNetTrainerRFNett"):
        _ = training.nnUNetTrainerRFNett


def test_the_log_names_dropped_options(nnunet_folders: Path) -> None:
    options = {"fusion": "sfusion", "fusion_options": {"depth": 2, "grid": 4}}
    trainer = make_trainer(nnUNetTrainermmFormer, write_dataset(nnunet_folders), options)
    trainer.initialize()
    log = Path(trainer.log_file).read_text()
    assert "{'depth': 2, 'grid': 4} were set for sfusion and are not used" in log
    assert log.count("not used") == 1


def test_notes_only_where_there_is_something_to_say() -> None:
    planned = options_with(fusion="mmformer", fusion_options={"depth": 2}, seed=3)
    assert run_notes("T", planned, {"fusion": "mmformer"}, 0) == []
    assert run_notes("T", planned, {"soft_label": "none"}, 0) == []
    (note,) = run_notes("T", planned, {}, 4)
    assert note.startswith("seed=3: exact repetition needs nnUNet_n_proc_DA=0")
    assert run_notes("T", Options(), {"fusion": "mean"}, 4) == []
    published = options_with(reading="reference", criterion="published")
    assert run_notes("T", published, {}, 0) == []
    (note,) = run_notes("T", published, {}, 0, regions=True)
    assert "is of labels; the fused prediction of regions keeps nnU-Net's loss" in note
    assert run_notes("T", options_with(teacher_augmentation=True), {}, 0) == []
    (note,) = run_notes("T", options_with(teacher_augmentation=True), {"consistency_weight": 0.0}, 0)
    assert note.startswith("teacher_augmentation: of the consistency term, which is off")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_log_says_that_a_compiled_network_keeps_everything(
    nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders))
    monkeypatch.setattr(trainer, "_do_i_compile", lambda: compiled)
    trainer.initialize()
    said = "gradient_checkpointing does nothing in a compiled network" in Path(trainer.log_file).read_text()
    assert said is compiled


def test_a_cascade_is_told_where_its_label_maps_come_from() -> None:
    (note,) = run_notes("T", Options(), {}, 0, cascaded=True)
    assert note.startswith("WARNING: the previous stage's label maps come from all modalities")
    assert run_notes("T", options_with(mask_sampling="fixed"), {}, 0, cascaded=True) == []


def test_a_subclass_fixes_what_its_base_fixes() -> None:
    class Wide(nnUNetTrainermmFormer):
        config_overrides = {"width_factor": 1.0, "fusion_options": {"depth": 2}}

    class OtherDesign(Wide):
        config_overrides = {"fusion": "mean"}

    class Quiet(nnUNetTrainerMGML_baseline):
        pass

    fixed = nnUNetTrainermmFormer.config_overrides
    options = {**fixed.get("fusion_options", {}), "depth": 2}
    assert Wide.config_overrides == {**fixed, "width_factor": 1.0, "fusion_options": options}
    expected = {**fixed, "width_factor": 1.0, "fusion": "mean"}
    assert OtherDesign.config_overrides == {k: v for k, v in expected.items() if k != "fusion_options"}
    assert Quiet.config_overrides == nnUNetTrainerMGML_baseline.config_overrides
    assert nnUNetTrainerMGML.config_overrides == {}


# --- trainers from elsewhere ------------------------------------------------------------------------------------------
OTHERS = """
from nnunetv2_mgml.network.fusion import MeanFusion

class Thief(MeanFusion):
    name = "a_thief"
    trainer = "RFNet"

class Heir(find_design("region_aware")):
    name = "heir"

class Unspeakable(MeanFusion):
    name = "unspeakable"
    trainer = "My Design"
"""
ASK = """
import pickle
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
from nnunetv2_mgml.training import TRAINERS, nnUNetTrainerGated, nnUNetTrainerGated_MGML
for trainer in (nnUNetTrainerGated, nnUNetTrainerGated_MGML):
    assert find(trainer.__name__) is find(trainer.__name__) is pickle.loads(pickle.dumps(trainer)) is trainer
alone, mgml = nnUNetTrainerGated.resolve_options({}), nnUNetTrainerGated_MGML.resolve_options({})
assert (alone.network.fusion, alone.value("soft_label")) == ("gated", "none")
assert (mgml.network.fusion, mgml.value("soft_label")) == ("gated", "meta_amf")
assert alone.network.fusion_options == mgml.network.fusion_options == {"sharpness": 3.0}
assert TRAINERS["nnUNetTrainerRFNet"].resolve_options({}).network.fusion == "region_aware"
print("designs with trainers:", len({trainer.resolve_options({}).network.fusion for trainer in TRAINERS.values()}))
"""


def environment(folder: Path) -> dict[str, str]:
    """Of a process that has the packages in ``folder`` and our trainers, whether or not our start-up line runs."""
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    return {**os.environ, "PYTHONPATH": path, EXT_VARIABLE: EXT_DIR}


def test_a_design_of_another_package_has_its_trainers(tmp_path: Path) -> None:
    """Two of them, found by name, and no other package's design takes a name away or gets one by heritage."""
    published = '    trainer = "Gated"\n    published_options = {"fusion_options": {"sharpness": 3.0}}\n'
    code = recipe().replace('    trainer = "Gated"\n', published)
    install(tmp_path, "my-fusion", {"gated": "my_fusion:GatedFusion"}, code)
    points = {name: f"others:{name}" for name in ("Thief", "Heir", "Unspeakable")}
    install(tmp_path, "others", points, f"from nnunetv2_mgml.network.fusion import find_design\n{OTHERS}")
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    own = {config.network.fusion for config in (trainer.resolve_options({}) for trainer in TRAINERS.values())} - {
        "gated"
    }
    assert done.stdout.splitlines()[-1] == f"designs with trainers: {len(own) + 1}"
    taken = "there is a nnUNetTrainerRFNet and a nnUNetTrainerRFNet_MGML already"
    assert f"Fusion design 'a_thief' (others) gets no trainers: {taken}" in done.stderr
    assert "cannot be called nnUNetTrainerMy Design: its class attribute 'trainer' must consist of" in done.stderr


@pytest.mark.slow
def test_nnunet_trains_a_design_of_another_package(nnunet_folders: Path) -> None:
    install(nnunet_folders, "my-fusion", {"gated": "my_fusion:GatedFusion"}, recipe())
    options = {**TINY, "num_epochs": 1, "validate_subsets": False}
    write_dataset(nnunet_folders, plans_dict={**plans(), PLANS_KEY: {"config": options}})
    command = ["nnUNetv2_train", "900", "3d_fullres", "0", "-tr", "nnUNetTrainerGated", "-device", "cpu"]
    done = subprocess.run(
        [Path(sys.executable).with_name(command[0]), *command[1:]],
        env={**environment(nnunet_folders), "nnUNet_n_proc_DA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = nnunet_folders / "results" / "Dataset900_Phantom" / "nnUNetTrainerGated__nnUNetPlans__3d_fullres"
    assert json.loads((folder / "plans.json").read_text())[PLANS_KEY]["config"]["fusion"] == "gated"
    assert (folder / "fold_0" / "checkpoint_final.pth").is_file()


MINE = """
from nnunetv2_mgml.training import nnUNetTrainerMGML

class nnUNetTrainerMine(nnUNetTrainerMGML):
    config_overrides = {"fusion": "mean", "num_epochs": 2}

    def on_train_epoch_end(self, train_outputs):
        super().on_train_epoch_end(train_outputs)
        self.training_log.add({"mine": self.current_epoch + 0.5})
"""


def test_a_trainer_of_the_users_own(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class in a folder of nnUNet_extTrainer: found, trained, and found again for its model."""
    (nnunet_folders / "mine").mkdir()
    (nnunet_folders / "mine" / "my_trainers.py").write_text(MINE)
    monkeypatch.setenv(EXT_VARIABLE, os.pathsep.join([str(nnunet_folders / "mine"), EXT_DIR]))
    found = recursive_find_trainer_class_by_name("nnUNetTrainerMine")
    trainer = make_trainer(found, write_dataset(nnunet_folders))
    trainer.run_training()
    assert [row["mine"] for row in read_log(Path(trainer.output_folder) / LOG_NAME)] == [0.5, 1.5]
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    assert type(predictor.network.fusion).name == "mean"
