"""`mgml plan`: options in plans of their own; another patch size gives the network nnU-Net's planner would give."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import BRATS_JSON
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml import __version__, planning, topology
from nnunetv2_mgml.config import MGMLConfig

CHANNELS = ("t1", "t1ce", "t2", "flair")
DATASET = "Dataset137_Tiny"


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    planning.add_arguments(parser)
    return parser.parse_args(arguments)


def nnunet_plans(root: Path, planner: type = ExperimentPlanner, spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
                 shape: tuple[int, ...] = (140, 170, 140), gpu: float = 8) -> dict:
    """Plans as nnU-Net's planner writes them, from a fingerprint; the images are never opened."""
    raw, preprocessed = root / "raw" / DATASET, root / "preprocessed" / DATASET
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True, exist_ok=True)
    for case in ("a", "b"):
        (raw / "labelsTr" / f"{case}.nii.gz").touch()
        for channel in range(4):
            (raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz").touch()
    dataset_json = {**BRATS_JSON, "overwrite_image_reader_writer": "SimpleITKIO"}
    (raw / "dataset.json").write_text(json.dumps(dataset_json))
    fingerprint = {"spacings": [list(spacing)] * 2, "shapes_after_crop": [list(shape)] * 2,
                   "median_relative_size_after_cropping": 0.3, "foreground_intensity_properties_per_channel": {}}
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    with pytest.MonkeyPatch.context() as patch:
        # memory by the number of voxels: fast, since no network is built, and what it decides is the patch size only
        patch.setattr(planner, "static_estimate_VRAM_usage", staticmethod(
            lambda size, *_: float(np.prod(size)) * (300 if len(size) == 3 else 20000)))
        planner(DATASET, gpu_memory_target_in_gb=gpu, plans_name="nnUNetPlans").plan_experiment()
    return json.loads((preprocessed / "nnUNetPlans.json").read_text())


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """nnU-Net's folders with a planned dataset, and its plans with two more configurations that inherit."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(root / name))
        plans = nnunet_plans(root)
    plans["configurations"]["3d_bs4"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    plans["configurations"]["3d_small"] = {"inherits_from": "3d_bs4", "patch_size": [64, 64, 64]}
    (root / "preprocessed" / DATASET / "nnUNetPlans.json").write_text(json.dumps(plans, indent=4))
    return root, plans


@pytest.fixture
def folder(stock, tmp_path, monkeypatch) -> Path:
    """A copy of the planned dataset, the only one in nnUNet_preprocessed."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return Path(shutil.copytree(stock[0] / "preprocessed" / DATASET, tmp_path / DATASET))


def resolved(plans: dict, name: str) -> dict:
    return PlansManager(plans).get_configuration(name).configuration


@pytest.mark.parametrize("planner", [ExperimentPlanner, ResEncUNetPlanner])
@pytest.mark.parametrize(("spacing", "shape"), [((1.0, 1.0, 1.0), (140, 170, 140)), ((5.0, 0.8, 0.8), (20, 256, 256))])
def test_replanning_gives_what_nnunets_planner_gives(planner, spacing, shape, nnunet_folders):
    plans = {gpu: nnunet_plans(nnunet_folders, planner, spacing, shape, gpu) for gpu in (2, 16)}
    for name in ("2d", "3d_fullres"):
        small, large = (plans[gpu]["configurations"][name] for gpu in (2, 16))
        assert small["patch_size"] != large["patch_size"]
        replanned = topology.replan(large, small["patch_size"])
        assert replanned == {"patch_size": small["patch_size"], "architecture": small["architecture"]}


def test_more_stages_extend_the_lists(stock):
    configuration = copy.deepcopy(stock[1]["configurations"]["3d_fullres"])
    first = topology.replan(configuration, [32, 32, 32])
    configuration.update(first)
    kwargs = configuration["architecture"]["arch_kwargs"]
    assert (kwargs["n_stages"], kwargs["features_per_stage"]) == (4, [32, 64, 128, 256])
    kwargs["n_conv_per_stage"] = [1, 2, 3, 4]
    kwargs["n_conv_per_stage_decoder"] = [1, 2, 3]
    wide = topology.replan(configuration, [128, 128, 128])["architecture"]["arch_kwargs"]
    assert wide["n_stages"] == len(wide["strides"]) == len(wide["kernel_sizes"]) == 6
    assert wide["features_per_stage"] == [32, 64, 128, 256, 256, 256]
    assert wide["n_conv_per_stage"] == [1, 2, 3, 4, 4, 4]
    assert wide["n_conv_per_stage_decoder"] == [1, 2, 3, 3, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 3).flatmap(lambda d: st.tuples(
    st.lists(st.sampled_from([0.5, 1.0, 1.0, 2.0, 5.0]), min_size=d, max_size=d),
    st.lists(st.integers(4, 200), min_size=d, max_size=d))))
def test_nearest_allowed_size(case):
    spacing, size = case
    nearest = topology.nearest_allowed_size(spacing, size)
    padded = {tuple(s): get_pool_and_conv_props(spacing, s, topology.MIN_FEATURE_MAP, 999999)[3]
              for s in (size, nearest)}
    assert tuple(nearest) == padded[tuple(nearest)]
    distance = np.abs(np.subtract(nearest, size)).sum()
    assert distance <= np.abs(np.subtract(padded[tuple(size)], size)).sum()
    assert (distance == 0) == (padded[tuple(size)] == tuple(size))


def test_min_feature_map_is_nnunets(stock, nnunet_folders):
    nnunet_plans(nnunet_folders)
    assert ExperimentPlanner(DATASET).UNet_featuremap_min_edge_length == topology.MIN_FEATURE_MAP


@pytest.mark.parametrize(("name", "size", "message"), [
    ("3d_fullres", [90, 84, 60], r"Nearest allowed size: \[96, 80, 56\]"),
    ("3d_fullres", [8, 8, 8], "network of 2 stages; at least 3 are needed: use at least 16 voxels"),
    ("3d_fullres", [80, 80], r"\[80, 80\] has 2 axes, this configuration has 3"),
    ("2d", [80, 80, 80], r"Configuration 2d: patch_size \[80, 80, 80\] has 3 axes"),
])
def test_patch_sizes_that_cannot_be(stock, name, size, message):
    with pytest.raises(ValueError, match=message):
        planning.make_plans(stock[1], {"patch_size": size}, [name], "P", CHANNELS)


def test_an_architecture_without_strides_keeps_its_patch_size(stock):
    configuration = copy.deepcopy(stock[1]["configurations"]["3d_fullres"])
    configuration["architecture"] = {"network_class_name": "some.Transformer", "arch_kwargs": {"depth": 3}}
    with pytest.raises(ValueError, match=r"some\.Transformer has no .*strides"):
        topology.replan(configuration, [80, 80, 80])


def test_options_go_into_a_block_and_nothing_else_changes(stock):
    source = copy.deepcopy(stock[1])
    plans = planning.make_plans(source, {"num_epochs": 5, "temperature": 2}, ["3d_fullres"], "Mine", CHANNELS)
    assert source == stock[1]
    assert plans.pop("mgml") == {"config": MGMLConfig(num_epochs=5, temperature=2.0).as_dict(),
                                 "version": __version__, "stock_plans": "nnUNetPlans"}
    assert plans.pop("plans_name") == "Mine"
    assert plans == {k: v for k, v in source.items() if k != "plans_name"}


def test_options_start_from_those_in_the_plans(stock):
    first = planning.make_plans(stock[1], {"num_epochs": 5}, ["3d_fullres"], "One", CHANNELS)
    second = planning.make_plans(first, {"seed": 3}, ["3d_fullres"], "Two", CHANNELS)
    assert MGMLConfig.from_plans(second) == MGMLConfig(num_epochs=5, seed=3)


def test_inheritance_is_respected(stock):
    source = stock[1]
    changes = {"patch_size": [32, 32, 32], "batch_size": 7}
    plans = planning.make_plans(source, changes, ["3d_fullres"], "P", CHANNELS)
    assert resolved(plans, "3d_fullres")["batch_size"] == 7
    assert resolved(plans, "3d_bs4")["batch_size"] == 4
    assert resolved(plans, "3d_bs4")["patch_size"] == [32, 32, 32]
    assert resolved(plans, "3d_bs4")["architecture"] == resolved(plans, "3d_fullres")["architecture"]
    # it has a patch size of its own, so it keeps the network that fits
    assert resolved(plans, "3d_small")["patch_size"] == [64, 64, 64]
    assert resolved(plans, "3d_small")["architecture"] == resolved(source, "3d_small")["architecture"]
    assert plans["configurations"]["2d"] == source["configurations"]["2d"]

    child = planning.make_plans(source, changes, ["3d_bs4"], "P", CHANNELS)
    assert child["configurations"]["3d_fullres"] == source["configurations"]["3d_fullres"]
    assert child["configurations"]["3d_bs4"]["inherits_from"] == "3d_fullres"
    assert resolved(child, "3d_bs4")["architecture"]["arch_kwargs"]["n_stages"] == 4
    assert resolved(child, "3d_bs4")["data_identifier"] == resolved(source, "3d_bs4")["data_identifier"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"tau": 1}, r"Unknown option tau\. Allowed: num_epochs.*batch_size, patch_size, batch_dice"),
    ({"batch_size": 0}, "batch_size: 0. Expected .* >= 1"),
    ({"batch_size": True}, "batch_size: True"),
    ({"batch_size": [2]}, r"batch_size: \[2\]"),
    ({"batch_dice": 1}, "batch_dice: 1. Expected true"),
    ({"patch_size": 80}, "patch_size: 80"),
    ({"patch_size": "80x80xa"}, r"patch_size: \[80, 80, 'a'\]"),
    ({"patch_size": [80.0, 80.0, 80.0]}, "patch_size"),
    ({"temperature": "hot"}, "option temperature: 'hot'"),
    ({"fusion": "average"}, "Unknown fusion design 'average'. Allowed: .*mean"),
    ({"fusion": "mean", "fusion_options": {"heads": 2}}, "'mean' has no option heads"),
    ({"mask_sampling": "bernoulli", "modality_missing_rate": {"pet": 0.5}}, "Unknown modality 'pet'"),
])
def test_bad_options(stock, changes, message):
    with pytest.raises(ValueError, match=message):
        planning.make_plans(stock[1], changes, ["3d_fullres"], "P", CHANNELS)


@pytest.mark.parametrize("name", ["a__b", "a/b", "", "my plans"])
def test_bad_plans_names(stock, name):
    with pytest.raises(ValueError, match="Bad plans name"):
        planning.make_plans(stock[1], {}, ["3d_fullres"], name, CHANNELS)


def test_command_writes_plans_nnunet_reads(folder, capsys):
    before = (folder / "nnUNetPlans.json").read_bytes()
    options = ["fusion=mean", "patch_size=64x64x48", "batch_dice=true"]
    assert planning.run(parse("-d", "137", "--set", *options, "--set", "num_epochs=3")) == 0
    out = capsys.readouterr().out
    assert str(folder / "nnUNetMGMLPlans.json") in out
    assert "nnUNetv2_train 137 3d_fullres 0 -tr nnUNetTrainerMGML -p nnUNetMGMLPlans" in out
    assert (folder / "nnUNetPlans.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", "dataset_fingerprint.json",
                                                        "nnUNetMGMLPlans.json", "nnUNetPlans.json"]
    manager = PlansManager(str(folder / "nnUNetMGMLPlans.json"))
    configuration = manager.get_configuration("3d_fullres")
    assert (manager.plans_name, configuration.patch_size) == ("nnUNetMGMLPlans", [64, 64, 48])
    assert configuration.batch_dice is True
    assert configuration.data_identifier == "nnUNetPlans_3d_fullres"
    assert MGMLConfig.from_plans(manager.plans) == MGMLConfig(fusion="mean", num_epochs=3)


def test_paper_preset_and_set_over_it(folder):
    planning.run(parse("-d", DATASET, "--preset", "paper", "--set", "seed=7"))
    plans = json.loads((folder / "nnUNetMGMLPlans.json").read_text())
    assert MGMLConfig.from_plans(plans) == MGMLConfig(optimizer="adam", initial_lr=2e-4, weight_decay=1e-4,
                                                      num_epochs=900, num_iterations_per_epoch=150, seed=7,
                                                      augmentation="paper", deterministic=True,
                                                      complete_view_weight=0.0)
    configuration = plans["configurations"]["3d_fullres"]
    assert (configuration["patch_size"], configuration["batch_size"]) == ([80, 80, 80], 1)
    assert configuration["architecture"]["arch_kwargs"]["n_stages"] == 5


def test_preset_nnunet_takes_the_paper_back(folder):
    """All that the paper preset set, patch and architecture included; what it did not set stays."""
    stock = json.loads((folder / "nnUNetPlans.json").read_text())
    planning.run(parse("-d", DATASET, "--preset", "paper", "-c", "3d_fullres", "3d_bs4", "3d_small", "--set",
                       "fusion=mean"))
    planning.run(parse("-d", DATASET, "-p", "nnUNetMGMLPlans", "--set", "temperature=3"))
    kept = MGMLConfig.from_plans(json.loads((folder / "nnUNetMGMLPlans.json").read_text()))
    assert (kept.optimizer, kept.seed) == ("adam", 1024)  # no preset: what the plans have
    planning.run(parse("-d", DATASET, "-p", "nnUNetMGMLPlans", "--preset", "nnunet", "-c", "3d_fullres", "3d_bs4",
                       "3d_small", "--set", "batch_size=3"))
    plans = json.loads((folder / "nnUNetMGMLPlans.json").read_text())
    assert MGMLConfig.from_plans(plans) == MGMLConfig(fusion="mean", temperature=3.0)
    for name in ("3d_fullres", "3d_bs4", "3d_small"):
        assert resolved(plans, name) == {**resolved(stock, name), "batch_size": 3}


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
    assert "augmentation=paper, complete_view_weight=0.0, seed=1024, deterministic=True" in said
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
    network = get_network_from_plans(configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
                                     configuration.network_arch_init_kwargs_req_import, 4, 3, deep_supervision=True)
    assert isinstance(network, PlainConvUNet)
    import torch

    outputs = network(torch.zeros(1, 4, *configuration.patch_size))
    assert [tuple(o.shape[2:]) for o in outputs] == [(16,) * 3, (8,) * 3]


@pytest.mark.parametrize(("arguments", "kind", "message"), [
    ([], ValueError, "-d is missing"),
    (["-d", "tumour"], ValueError, "neither a dataset id"),
    (["-d", "9"], FileNotFoundError, f"no dataset 9 .*{DATASET}.*nnUNetv2_plan_and_preprocess -d 9 first"),
    (["-d", "137", "-p", "Other"], FileNotFoundError, "Other.json .*nnUNetPlans.*nnUNetv2_plan_and_preprocess first"),
    (["-d", "137", "-c", "3d_lowres"], ValueError, "no configuration 3d_lowres. Allowed: 2d, 3d_fullres"),
    (["-d", "137", "--plans_name", "nnUNetPlans"], ValueError, "would overwrite nnU-Net's own plans"),
    (["-d", "137", "--set", "seed"], ValueError, "key=value"),
])
def test_command_errors(folder, arguments, kind, message):
    with pytest.raises(kind, match=message):
        planning.run(parse(*arguments))
    assert not (folder / "nnUNetMGMLPlans.json").exists()


def test_ambiguous_dataset_unset_variable_and_broken_file(folder, monkeypatch):
    (folder / "nnUNetPlans.json").write_text("{")
    with pytest.raises(ValueError, match=r"nnUNetPlans\.json is not valid JSON"):
        planning.run(parse("-d", "137"))
    (folder.parent / "Dataset137_Other").mkdir()
    with pytest.raises(FileNotFoundError, match="ambiguous: Dataset137_Other, Dataset137_Tiny"):
        planning.run(parse("-d", "137"))
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(ValueError, match="nnUNet_preprocessed is not set"):
        planning.run(parse("-d", "137"))


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


def test_default_configuration(stock):
    assert planning.default_configurations(stock[1]) == ["3d_fullres"]
    assert planning.default_configurations({"configurations": {"2d": {}}}) == ["2d"]


def test_list_names_every_option(capsys):
    assert planning.run(parse("--list")) == 0
    out = capsys.readouterr().out
    assert all(f"{name} = " in out for name in MGMLConfig.names())
    assert all(f"\n{key}\n" in out for key in planning.NNUNET_KEYS)
