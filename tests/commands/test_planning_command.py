"""`mgml plan` as a command: files it writes, presets, what it says, errors."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
from builders import options_with
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planning_cases import DATASET, plans_that_inherit, resolved

from nnunetv2_mgml.commands import plan as planning
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.training import nnUNetTrainerMGML, nnUNetTrainerModalityDropout_conditional
from nnunetv2_mgml.workflows.plan import PlanRequest, write_plans


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    planning.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nnunet")
    plans_that_inherit(root)
    return root / "preprocessed" / DATASET


@pytest.fixture
def folder(planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the planned dataset, the only one in nnUNet_preprocessed."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return Path(shutil.copytree(planned, tmp_path / DATASET))


def test_command_writes_plans_nnunet_reads(folder, capsys):
    before = (folder / "nnUNetPlans.json").read_bytes()
    options = ["fusion=mean", "patch_size=64x64x48", "batch_dice=true"]
    assert planning.run(parse("-d", "137", "--set", *options, "--set", "num_epochs=3")) == 0
    out = capsys.readouterr().out
    assert str(folder / "nnUNetMGMLPlans.json") in out
    assert "nnUNetv2_train 137 3d_fullres 0 -tr nnUNetTrainerMGML -p nnUNetMGMLPlans" in out
    assert (folder / "nnUNetPlans.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "dataset.json",
        "dataset_fingerprint.json",
        "nnUNetMGMLPlans.json",
        "nnUNetPlans.json",
    ]
    manager = PlansManager(str(folder / "nnUNetMGMLPlans.json"))
    configuration = manager.get_configuration("3d_fullres")
    assert (manager.plans_name, configuration.patch_size) == ("nnUNetMGMLPlans", [64, 64, 48])
    assert configuration.batch_dice is True
    assert configuration.data_identifier == "nnUNetPlans_3d_fullres"
    assert Options.from_plans(manager.plans) == options_with(fusion="mean", num_epochs=3)


def test_paper_preset_and_set_over_it(folder):
    planning.run(parse("-d", DATASET, "--preset", "paper", "--set", "seed=7"))
    plans = json.loads((folder / "nnUNetMGMLPlans.json").read_text())
    assert Options.from_plans(plans) == options_with(
        optimizer="adam",
        initial_lr=2e-4,
        weight_decay=1e-4,
        num_epochs=900,
        num_iterations_per_epoch=150,
        seed=7,
        augmentation="paper",
        deterministic=True,
        complete_view_weight=0.0,
        complete_every=1,
        network_form="multi_encoder",
        modality_decoder_scale=0,
        conditional_norms=False,
    )
    configuration = plans["configurations"]["3d_fullres"]
    assert (configuration["patch_size"], configuration["batch_size"]) == ([80, 80, 80], 1)
    assert configuration["architecture"]["arch_kwargs"]["n_stages"] == 5


def test_preset_nnunet_takes_the_paper_back(folder):
    """All that the paper preset set, patch and architecture included; what it did not set stays."""
    stock = json.loads((folder / "nnUNetPlans.json").read_text())
    planning.run(
        parse("-d", DATASET, "--preset", "paper", "-c", "3d_fullres", "3d_bs4", "3d_small", "--set", "fusion=mean")
    )
    planning.run(parse("-d", DATASET, "-p", "nnUNetMGMLPlans", "--set", "temperature=3"))
    kept = Options.from_plans(json.loads((folder / "nnUNetMGMLPlans.json").read_text()))
    assert (kept.training.optimizer, kept.training.seed) == ("adam", 1024)  # no preset: what the plans have
    planning.run(
        parse(
            "-d",
            DATASET,
            "-p",
            "nnUNetMGMLPlans",
            "--preset",
            "nnunet",
            "-c",
            "3d_fullres",
            "3d_bs4",
            "3d_small",
            "--set",
            "batch_size=3",
        )
    )
    plans = json.loads((folder / "nnUNetMGMLPlans.json").read_text())
    assert Options.from_plans(plans) == options_with(fusion="mean", temperature=3.0)
    for name in ("3d_fullres", "3d_bs4", "3d_small"):
        assert resolved(plans, name) == {**resolved(stock, name), "batch_size": 3}


def test_sizes_that_come_back_are_said(folder, capsys):
    stock = resolved(json.loads((folder / "nnUNetPlans.json").read_text()), "3d_fullres")
    planning.run(parse("-d", DATASET, "--preset", "paper", "--plans_name", "P1"))
    capsys.readouterr()
    planning.run(parse("-d", DATASET, "-p", "P1", "--plans_name", "P2", "--preset", "nnunet", "--set", "batch_size=3"))
    lines = capsys.readouterr().out.splitlines()
    assert f"  patch_size = {json.dumps(stock['patch_size'])} (3d_fullres), nnU-Net's own again" in lines
    assert [line for line in lines if "batch_size" in line] == ["  batch_size = 3 (3d_fullres)"]
    planning.run(parse("-d", DATASET, "-p", "P2", "--plans_name", "P3", "--preset", "nnunet"))
    assert "patch_size" not in capsys.readouterr().out


def test_sizes_and_stock_plans_that_are_lost_are_said(folder, capsys):
    content = json.loads((folder / "nnUNetPlans.json").read_text())
    stock = resolved(content, "3d_fullres")
    (folder / "nnUNetResEncUNetMPlans.json").write_text(json.dumps({**content, "plans_name": "nnUNetResEncUNetMPlans"}))
    sizes = ["patch_size=64x64x64", "batch_size=5"]
    planning.run(parse("-d", DATASET, "-p", "nnUNetResEncUNetMPlans", "--set", *sizes))
    capsys.readouterr()
    planning.run(parse("-d", DATASET, "--set", "num_epochs=300", "batch_size=3"))
    lines = capsys.readouterr().out.splitlines()
    kept = "start from the old plans with -p nnUNetMGMLPlans to keep it"
    assert f"  patch_size = {json.dumps(stock['patch_size'])} (3d_fullres), was [64, 64, 64]; {kept}" in lines
    assert "  made from nnUNetPlans, were made from nnUNetResEncUNetMPlans: give -p to choose" in lines
    assert [line for line in lines if "batch_size" in line] == ["  batch_size = 3 (3d_fullres)"]
    planning.run(parse("-d", DATASET, "-p", "nnUNetMGMLPlans", "--set", "num_epochs=200"))
    assert "was" not in capsys.readouterr().out


def test_features_that_are_lost_or_come_back_are_said(folder, capsys):
    own = resolved(json.loads((folder / "nnUNetPlans.json").read_text()), "3d_fullres")
    own = own["architecture"]["arch_kwargs"]["features_per_stage"]
    half = [n // 2 for n in own]
    planning.run(parse("-d", DATASET, "--set", "features_per_stage=0.5"))
    assert "  features_per_stage = 0.5 (3d_fullres)" in capsys.readouterr().out.splitlines()
    planning.run(parse("-d", DATASET, "-p", "nnUNetMGMLPlans", "--plans_name", "P", "--preset", "nnunet"))
    assert f"  features_per_stage = {own} (3d_fullres), nnU-Net's own again" in capsys.readouterr().out.splitlines()
    planning.run(parse("-d", DATASET, "-p", "nnUNetMGMLPlans", "--plans_name", "Q", "--set", "patch_size=32x32x32"))
    assert "features_per_stage" not in capsys.readouterr().out  # fewer stages, the same features
    planning.run(parse("-d", DATASET, "--set", "num_epochs=300"))
    kept = "start from the old plans with -p nnUNetMGMLPlans to keep it"
    assert f"  features_per_stage = {own} (3d_fullres), was {half}; {kept}" in capsys.readouterr().out.splitlines()


def test_configurations_that_inherit_are_said_to_follow(folder, capsys):
    """Once, as following; not as something that was lost, a second time either."""
    for plans in ("nnUNetPlans", "nnUNetMGMLPlans"):
        planning.run(parse("-d", DATASET, "-p", plans, "--set", "patch_size=64x64x64", "features_per_stage=0.5"))
        lines = capsys.readouterr().out.splitlines()
        assert "  patch_size, features_per_stage (3d_bs4): inherited, as just set" in lines
        assert not any("was" in line.split() or "was [" in line for line in lines)
        assert not any("3d_small" in line for line in lines)


def test_gpu_memory_keeps_the_stages_that_were_named(folder, capsys, by_voxels):
    """A patch with fewer stages would leave out numbers of the list; with a factor it may be taken."""
    planning.run(parse("-d", DATASET, "--set", "patch_size=96x96x96", "--plans_name", "Large"))
    given = ["-d", DATASET, "-p", "Large", "--set", "batch_size=1", "width_factor=0.5"]
    stages = [8, 16, 24, 32, 40]

    def found(features: object, gigabytes: str) -> dict:
        planning.run(parse(*given, f"features_per_stage={features}", "--gpu_memory", gigabytes))
        plans = json.loads((folder / "nnUNetMGMLPlans.json").read_text())
        return resolved(plans, "3d_fullres")

    fitted = found(stages, "0.5")
    assert fitted["patch_size"] != [96, 96, 96]
    assert fitted["architecture"]["arch_kwargs"]["features_per_stage"] == stages
    assert found(0.5, "0.2")["architecture"]["arch_kwargs"]["n_stages"] < len(stages)
    with pytest.raises(ValueError, match=r"does not fit .*batch_size, width_factor, features_per_stage"):
        found(stages, "0.2")


def test_half_of_the_features_narrow_the_stock_network_and_ours(folder):
    """The conditional stock network of `features_per_stage=0.5`: nnU-Net builds it from the plans alone."""
    counts = {}
    for name, changes in (("Whole", []), ("Half", ["features_per_stage=0.5"])):
        planning.run(parse("-d", DATASET, "--plans_name", name, "--set", "patch_size=32x32x32", *changes))
        plans = PlansManager(str(folder / f"{name}.json"))
        configuration = plans.get_configuration("3d_fullres")
        for trainer in (nnUNetTrainerModalityDropout_conditional, nnUNetTrainerMGML):
            plans.plans["mgml"]["num_classes"] = 4
            network = trainer.build_network_architecture(plans, configuration, 4, 3, False)
            counts[name, trainer] = sum(p.numel() for p in network.parameters())
    for trainer in (nnUNetTrainerModalityDropout_conditional, nnUNetTrainerMGML):
        assert 3 < counts["Whole", trainer] / counts["Half", trainer] < 4.2


def test_early_fusion_over_options_of_another_design(folder):
    options = ["fusion=mmformer", 'fusion_options={"depth": 2}', "rebalancing=passion"]
    planning.run(parse("-d", DATASET, "--plans_name", "P1", "--set", *options))
    planning.run(parse("-d", DATASET, "-p", "P1", "--plans_name", "P2", "--preset", "early-fusion"))
    now = Options.from_plans(json.loads((folder / "P2.json").read_text()))
    assert (now.network.fusion, now.network.fusion_options, now.value("rebalancing")) == ("concat", {}, "none")


def test_preset_nnunet_finds_the_plans_it_started_from(folder):
    (folder / "nnUNetPlans.json").rename(folder / "nnUNetResEncUNetMPlans.json")
    content = json.loads((folder / "nnUNetResEncUNetMPlans.json").read_text())
    (folder / "nnUNetResEncUNetMPlans.json").write_text(json.dumps({**content, "plans_name": "nnUNetResEncUNetMPlans"}))
    planning.run(parse("-d", DATASET, "-p", "nnUNetResEncUNetMPlans", "--preset", "paper"))
    for name in ("A", "B"):
        planning.run(parse("-d", DATASET, "-p", "nnUNetMGMLPlans", "--plans_name", name, "--preset", "nnunet"))
        plans = json.loads((folder / f"{name}.json").read_text())
        assert resolved(plans, "3d_fullres") == resolved(content, "3d_fullres")
    (folder / "nnUNetResEncUNetMPlans.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*nnUNetResEncUNetMPlans\.json"):
        planning.run(parse("-d", DATASET, "-p", "A", "--preset", "nnunet"))


def test_paper_preset_in_2d_says_what_to_do(folder):
    own = "x".join(map(str, resolved(json.loads((folder / "nnUNetPlans.json").read_text()), "2d")["patch_size"]))
    with pytest.raises(ValueError, match=rf"configuration 2d has 2 axes.*--set patch_size={own}; or choose a 3D"):
        planning.run(parse("-d", DATASET, "--preset", "paper", "-c", "2d"))
    assert planning.run(parse("-d", DATASET, "--preset", "paper", "-c", "2d", "--set", f"patch_size={own}")) == 0
    plans = json.loads((folder / "nnUNetMGMLPlans.json").read_text())
    assert resolved(plans, "2d")["batch_size"] == 1


def test_a_seeded_plan_says_what_exact_repetition_needs(folder, capsys):
    planning.run(parse("-d", DATASET))
    assert "exact repetition" not in capsys.readouterr().out
    planning.run(parse("-d", DATASET, "--preset", "paper"))
    assert capsys.readouterr().out.count("exact repetition needs nnUNet_n_proc_DA=0") == 1


def test_help_tells_the_paper_preset(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "augmentation=paper, complete_view_weight=0.0, complete_every=1, network_form=multi_encoder, "
        "modality_decoder_scale=0, conditional_norms=False, seed=1024, deterministic=True" in said
    )
    assert "rotation up to 10 degrees, intensity scale and shift 0.1, flips" in said
    assert "stays nnU-Net's" not in said


def test_written_plans_build_the_network(folder):
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    planning.run(parse("-d", DATASET, "-c", "3d_fullres", "2d", "--set", "batch_size=3"))
    planning.run(parse("-d", DATASET, "-p", "nnUNetMGMLPlans", "--set", "patch_size=16x16x16"))
    manager = PlansManager(str(folder / "nnUNetMGMLPlans.json"))
    configuration = manager.get_configuration("3d_fullres")
    assert (configuration.batch_size, manager.get_configuration("2d").batch_size) == (3, 3)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        4,
        3,
        deep_supervision=True,
    )
    assert isinstance(network, PlainConvUNet)
    import torch

    outputs = network(torch.zeros(1, 4, *configuration.patch_size))
    assert [tuple(o.shape[2:]) for o in outputs] == [(16,) * 3, (8,) * 3]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ([], ValueError, "-d is missing"),
        (["-d", "tumour"], ValueError, "neither a dataset id"),
        (["-d", "9"], FileNotFoundError, f"no dataset 9 .*{DATASET}.*nnUNetv2_plan_and_preprocess -d 9 first"),
        (
            ["-d", "137", "-p", "Other"],
            FileNotFoundError,
            "Other.json .*nnUNetPlans.*nnUNetv2_plan_and_preprocess first",
        ),
        (["-d", "137", "-c", "3d_lowres"], ValueError, "no configuration 3d_lowres. Allowed: 2d, 3d_fullres"),
        (
            ["-d", "137", "--plans_name", "nnUNetPlans"],
            ValueError,
            r"nnUNetPlans would overwrite .*nnUNetPlans\.json.*nnU-Net's own plans.*such as nnUNetPlans_MGML",
        ),
        (["-d", "137", "--set", "seed"], ValueError, "key=value"),
    ],
)
def test_command_errors(folder, arguments, kind, message):
    with pytest.raises(kind, match=message):
        planning.run(parse(*arguments))
    assert not (folder / "nnUNetMGMLPlans.json").exists()


@pytest.mark.parametrize("source", ["nnUNetPlans", "nnUNetMGMLPlans"])
@pytest.mark.parametrize(
    "name", ["nnUNetPlans", "nnUNetResEncUNetMPlans", "dataset", "dataset_fingerprint", "splits_final"]
)
def test_files_of_others_are_not_overwritten(folder, source, name):
    """Whatever the plans start from; only plans that we wrote may be replaced."""
    shutil.copy(folder / "nnUNetPlans.json", folder / "nnUNetResEncUNetMPlans.json")
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    planning.run(parse("-d", "137"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=rf"would overwrite .*{name}\.json.*such as {name}_MGML"):
        planning.run(parse("-d", "137", "-p", source, "--plans_name", name))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert planning.run(parse("-d", "137", "-p", source, "--plans_name", f"{name}_MGML")) == 0


def test_ambiguous_dataset_unset_variable_and_broken_file(folder, monkeypatch):
    (folder / "nnUNetPlans.json").write_text("{")
    with pytest.raises(ValueError, match=r"nnUNetPlans\.json is not valid JSON"):
        planning.run(parse("-d", "137"))
    (folder.parent / "Dataset137_Other").mkdir()
    with pytest.raises(ValueError, match="several names: Dataset137_Other, Dataset137_Tiny"):
        planning.run(parse("-d", "137"))
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(ValueError, match="nnUNet_preprocessed is not set"):
        planning.run(parse("-d", "137"))


def test_plans_are_written_from_python(folder):
    request = PlanRequest("137", {"fusion": "mean", "batch_size": 3}, presets=("paper",), plans_name="Mine")
    written = write_plans(request)
    plans = json.loads((folder / "Mine.json").read_text())
    assert (written.path, written.configurations, written.replaced) == (folder / "Mine.json", ("3d_fullres",), None)
    assert written.options == Options.from_plans(plans)
    assert written.options.network.fusion == "mean"
    assert (written.changes["batch_size"], written.changes["patch_size"]) == (3, [80, 80, 80])
    assert write_plans(PlanRequest("137", plans_name="Mine")).replaced == written.options
    (folder / "List.json").write_text("[]")
    with pytest.raises(ValueError, match=r"List\.json holds a list, not a JSON object\. Run nnUNetv2_plan"):
        write_plans(PlanRequest("137", plans="List"))


def test_a_failed_write_leaves_the_old_plans(folder, monkeypatch):
    planning.run(parse("-d", "137"))
    before = (folder / "nnUNetMGMLPlans.json").read_bytes()

    def no_space(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        planning.run(parse("-d", "137", "--set", "seed=1"))
    assert (folder / "nnUNetMGMLPlans.json").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_list_names_every_option(capsys):
    assert planning.run(parse("--list")) == 0
    out = capsys.readouterr().out
    assert all(f"{name} = " in out for name in Options.names())
    assert all(f"\n{key}\n" in out for key in planning.NNUNET_KEYS)


@pytest.fixture
def by_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kibibyte for every voxel of a batch."""
    from nnunetv2_mgml.objective import memory
    from nnunetv2_mgml.workflows import memory_budget

    def count(plans: dict, configuration: str, dataset_json: dict) -> memory.StepMemory:
        plan = PlansManager(plans).get_configuration(configuration)
        voxels = plan.patch_size[0] * plan.patch_size[1] * plan.patch_size[2]
        return memory.StepMemory(0, plan.batch_size * voxels * 1024)

    monkeypatch.setattr(memory_budget, "step_memory", count)


def test_gpu_memory_predicts_and_makes_it_fit(folder, capsys, by_voxels):
    planning.run(parse("-d", "137", "--gpu_memory"))
    out = capsys.readouterr().out
    before = resolved(json.loads((folder / "nnUNetMGMLPlans.json").read_text()), "3d_fullres")
    needs = before["batch_size"] * before["patch_size"][0] * before["patch_size"][1] * before["patch_size"][2] / 2**20
    assert f"a training step in 16 bit needs {needs:.2f} GiB, predicted from shapes" in out
    planning.run(parse("-d", "137", "--set", "fusion=mean", "--gpu_memory", "1"))
    out = capsys.readouterr().out
    after = resolved(json.loads((folder / "nnUNetMGMLPlans.json").read_text()), "3d_fullres")
    size = after["batch_size"] * after["patch_size"][0] * after["patch_size"][1] * after["patch_size"][2]
    assert size * 1024 <= 0.8 * 2**30
    assert "80% of 1 GB are 0.80" in out
    assert f"patch_size = {json.dumps(after['patch_size'])}" in out
    with pytest.raises(ValueError, match=r"above 0, got -1\.0"):
        planning.run(parse("-d", "137", "--gpu_memory", "-1"))


def test_gpu_memory_says_the_sizes_of_each_configuration(folder, capsys, by_voxels):
    stock = json.loads((folder / "nnUNetPlans.json").read_text())
    names = ["3d_small", "3d_fullres"]  # the former would inherit
    planning.run(parse("-d", "137", "-c", *names, "--gpu_memory", "0.3"))
    plans, lines = json.loads((folder / "nnUNetMGMLPlans.json").read_text()), capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.endswith("to fit the memory")]
    pairs = [(name, key) for name in names for key in ("batch_size", "patch_size")]
    expected = [
        f"  {key} = {json.dumps(resolved(plans, name)[key])} ({name}), to fit the memory"
        for name, key in pairs
        if resolved(plans, name)[key] != resolved(stock, name)[key]
    ]
    assert sorted(found) == sorted(expected)
    assert len({line.split("(")[1] for line in found}) == 2, "both had to be made smaller"


@pytest.mark.parametrize(("compiled", "kept"), [(None, True), ("1", True), ("f", False)])
def test_a_compiled_network_is_counted_without_checkpointing(folder, capsys, monkeypatch, compiled, kept):
    from nnunetv2_mgml.objective import memory
    from nnunetv2_mgml.workflows import memory_budget

    counted = []
    monkeypatch.delenv("nnUNet_compile", raising=False)
    if compiled is not None:
        monkeypatch.setenv("nnUNet_compile", compiled)
    monkeypatch.setattr(
        memory_budget, "step_memory", lambda plans, *_: (counted.append(plans), memory.StepMemory(0, 1))[1]
    )
    planning.run(parse("-d", "137", "--gpu_memory"))
    assert [Options.from_plans(plans).training.gradient_checkpointing for plans in counted] == [not kept] * len(counted)
    assert ("counted without gradient_checkpointing" in capsys.readouterr().out) is kept
    written = Options.from_plans(json.loads((folder / "nnUNetMGMLPlans.json").read_text()))
    assert written.training.gradient_checkpointing
