"""`mgml plan`: options in plans of their own; another patch size gives the network nnU-Net's planner would give."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from builders import options_with
from cohort_cases import write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from planning_cases import DATASET, nnunet_plans, plans_that_inherit, resolved

from nnunetv2_mgml import __version__
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans import topology
from nnunetv2_mgml.plans.presets import preset
from nnunetv2_mgml.workflows import plan as planning

CHANNELS = ("t1", "t1ce", "t2", "flair")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return plans_that_inherit(tmp_path_factory.mktemp("nnunet"))


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
    configuration = copy.deepcopy(stock["configurations"]["3d_fullres"])
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
@given(
    st.integers(2, 3).flatmap(
        lambda d: st.tuples(
            st.lists(st.sampled_from([0.5, 1.0, 1.0, 2.0, 5.0]), min_size=d, max_size=d),
            st.lists(st.integers(4, 200), min_size=d, max_size=d),
        )
    )
)
def test_nearest_allowed_size(case):
    spacing, size = case
    nearest = topology.nearest_allowed_size(spacing, size)
    padded = {
        tuple(s): get_pool_and_conv_props(spacing, s, topology.MIN_FEATURE_MAP, 999999)[3] for s in (size, nearest)
    }
    assert tuple(nearest) == padded[tuple(nearest)]
    distance = np.abs(np.subtract(nearest, size)).sum()
    assert distance <= np.abs(np.subtract(padded[tuple(size)], size)).sum()
    assert (distance == 0) == (padded[tuple(size)] == tuple(size))


def test_min_feature_map_is_nnunets(stock, nnunet_folders):
    nnunet_plans(nnunet_folders)
    assert ExperimentPlanner(DATASET).UNet_featuremap_min_edge_length == topology.MIN_FEATURE_MAP


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("3d_fullres", [90, 84, 60], r"Nearest allowed size: \[96, 80, 56\]"),
        ("3d_fullres", [8, 8, 8], "network of 2 stages; at least 3 are needed: use at least 16 voxels"),
        ("3d_fullres", [80, 80], r"\[80, 80\] has 2 axes, this configuration has 3"),
        ("2d", [80, 80, 80], r"Configuration 2d: patch_size \[80, 80, 80\] has 3 axes"),
    ],
)
def test_patch_sizes_that_cannot_be(stock, name, size, message):
    with pytest.raises(ValueError, match=message):
        planning.make_plans(stock, {"patch_size": size}, [name], "P", CHANNELS)


def test_an_architecture_without_strides_keeps_its_patch_size(stock):
    configuration = copy.deepcopy(stock["configurations"]["3d_fullres"])
    configuration["architecture"] = {"network_class_name": "some.Transformer", "arch_kwargs": {"depth": 3}}
    with pytest.raises(ValueError, match=r"some\.Transformer has no .*strides"):
        topology.replan(configuration, [80, 80, 80])


def test_options_go_into_a_block_and_nothing_else_changes(stock):
    source = copy.deepcopy(stock)
    plans = planning.make_plans(source, {"num_epochs": 5, "temperature": 2}, ["3d_fullres"], "Mine", CHANNELS)
    assert source == stock
    assert plans.pop("mgml") == {
        "config": options_with(num_epochs=5, temperature=2.0).as_dict(),
        "version": __version__,
        "stock_plans": "nnUNetPlans",
    }
    assert plans.pop("plans_name") == "Mine"
    assert plans == {k: v for k, v in source.items() if k != "plans_name"}


def test_options_start_from_those_in_the_plans(stock):
    first = planning.make_plans(stock, {"num_epochs": 5}, ["3d_fullres"], "One", CHANNELS)
    second = planning.make_plans(first, {"seed": 3}, ["3d_fullres"], "Two", CHANNELS)
    assert Options.from_plans(second) == options_with(num_epochs=5, seed=3)


def test_inheritance_is_respected(stock):
    source = stock
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


def features(plans: dict, name: str) -> list[int]:
    return resolved(plans, name)["architecture"]["arch_kwargs"]["features_per_stage"]


def test_features_are_a_multiple_of_the_plans_or_told_one_by_one(stock):
    own = features(stock, "3d_fullres")
    plans = planning.make_plans(stock, {"features_per_stage": 0.5}, ["3d_fullres"], "P", CHANNELS)
    assert own == features(stock, "3d_fullres")  # the source stays
    assert own[:3] == [32, 64, 128]
    assert features(plans, "3d_fullres") == [n // 2 for n in own]
    assert features(plans, "3d_bs4") == features(plans, "3d_fullres")  # inherits patch and architecture
    assert features(plans, "3d_small") == features(stock, "3d_small")
    assert plans["configurations"]["2d"] == stock["configurations"]["2d"]
    again = planning.make_plans(plans, {"features_per_stage": 2}, ["3d_fullres"], "P", CHANNELS)
    assert features(again, "3d_fullres") == own
    told = [8 * (n + 1) for n in range(len(own))]
    for value in (told, "x".join(map(str, told)), ",".join(map(str, told))):
        plans = planning.make_plans(stock, {"features_per_stage": value}, ["3d_fullres"], "P", CHANNELS)
        assert features(plans, "3d_fullres") == told


def test_features_follow_a_new_patch(stock):
    changes = {"patch_size": [32, 32, 32], "features_per_stage": [8, 16, 24, 32]}
    for order in (list(changes), list(reversed(changes))):
        plans = planning.make_plans(stock, {key: changes[key] for key in order}, ["3d_fullres"], "P", CHANNELS)
        assert resolved(plans, "3d_fullres")["patch_size"] == [32, 32, 32]
        assert features(plans, "3d_fullres") == [8, 16, 24, 32]
    narrow = planning.make_plans(stock, {"features_per_stage": 0.25}, ["3d_fullres"], "P", CHANNELS)
    smaller = planning.make_plans(narrow, {"patch_size": [32, 32, 32]}, ["3d_fullres"], "P", CHANNELS)
    assert features(smaller, "3d_fullres") == [8, 16, 32, 64]


def test_a_child_with_features_of_its_own_keeps_its_patch(stock):
    """Architecture and patch belong together, also when it is the parent that gets another patch later."""
    child = planning.make_plans(stock, {"features_per_stage": 0.5}, ["3d_bs4"], "P", CHANNELS)
    later = planning.make_plans(child, {"patch_size": [32, 32, 32]}, ["3d_fullres"], "P", CHANNELS)
    assert resolved(later, "3d_bs4")["patch_size"] == resolved(stock, "3d_bs4")["patch_size"]
    assert features(later, "3d_bs4") == [n // 2 for n in features(stock, "3d_bs4")]


def test_features_are_multiples_of_eight(stock):
    source = copy.deepcopy(stock)
    widths = source["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"]
    widths[:] = [8, 48, *widths[2:]]
    plans = planning.make_plans(source, {"features_per_stage": 0.5}, ["3d_fullres"], "P", CHANNELS)
    assert features(plans, "3d_fullres")[:2] == [8, 24]


def test_a_stem_is_narrowed_with_the_stages(stock):
    source = copy.deepcopy(stock)
    source["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["stem_channels"] = 32
    plans = planning.make_plans(source, {"features_per_stage": 0.5}, ["3d_fullres"], "P", CHANNELS)
    assert resolved(plans, "3d_fullres")["architecture"]["arch_kwargs"]["stem_channels"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tau": 1},
            r"Unknown option tau\. Allowed: num_epochs.*batch_dice, features_per_stage",
        ),
        ({"batch_size": 0}, "batch_size: 0. Expected .* >= 1"),
        ({"batch_size": True}, "batch_size: True"),
        ({"batch_size": [2]}, r"batch_size: \[2\]"),
        ({"batch_dice": 1}, "batch_dice: 1. Expected true"),
        ({"patch_size": 80}, "patch_size: 80"),
        ({"patch_size": "80x80xa"}, r"patch_size: \[80, 80, 'a'\]"),
        ({"patch_size": [80.0, 80.0, 80.0]}, "patch_size"),
        ({"features_per_stage": 0}, "features_per_stage: 0. Expected .* one whole number for each stage"),
        ({"features_per_stage": True}, "features_per_stage: True"),
        ({"features_per_stage": float("nan")}, "features_per_stage: nan"),
        ({"features_per_stage": [8, 16.0]}, r"features_per_stage: \[8, 16.0\]"),
        ({"features_per_stage": "half"}, r"features_per_stage: \['half'\]"),
        ({"features_per_stage": [8, 16]}, r"3d_fullres: features_per_stage \[8, 16\] has 2 numbers; .* stages"),
        ({"temperature": "hot"}, "option temperature: 'hot'"),
        ({"fusion": "average"}, "Unknown fusion design 'average'. Allowed: .*mean"),
        ({"fusion": "mean", "fusion_options": {"heads": 2}}, "'mean' has no option heads"),
        (
            {"fusion": "mmformer", "fusion_options": {"dropout": 1.5}},
            r"dropout .* is 1\.5; it must be a number in \[0, 1\)",
        ),
        ({"mask_sampling": "bernoulli", "modality_missing_rate": {"pet": 0.5}}, "Unknown modality 'pet'"),
    ],
)
def test_bad_options(stock, changes, message):
    with pytest.raises(ValueError, match=message):
        planning.make_plans(stock, changes, ["3d_fullres"], "P", CHANNELS)


@pytest.mark.parametrize("name", ["a__b", "a/b", "", "my plans"])
def test_bad_plans_names(stock, name):
    with pytest.raises(ValueError, match="Bad plans name"):
        planning.make_plans(stock, {}, ["3d_fullres"], name, CHANNELS)


def test_default_configuration(stock):
    assert planning.default_configurations(stock) == ["3d_fullres"]
    assert planning.default_configurations({"configurations": {"2d": {}}}) == ["2d"]


def test_colours_in_one_file_are_said(nnunet_folders):
    write_raw(nnunet_folders / "raw" / "Dataset046_RGB", {case: ["G", "B"] for case in "abc"}, channels="RGB")
    assert "one file for its 3 channels (R, G, B)" in planning.shared_files("Dataset046_RGB", ("R", "G", "B"))
    write_raw(nnunet_folders / "raw" / "Dataset047_MRI", {"a": ["t1"]}, channels=("ct", "t1"))
    assert planning.shared_files("Dataset047_MRI", ("ct", "t1")) == ""
    assert planning.shared_files("Dataset048_Elsewhere", ("ct", "t1")) == ""


def test_a_modality_decoder_that_cannot_be_is_refused(stock):
    """By the plans, before anything trains, whatever the losses; a preset whose network has none takes it back."""
    stages = stock["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_stages"]
    for more in ({}, {"modality_decoder_weight": 0.0, "soft_label": "none"}):
        changes = {"modality_decoder_scale": stages - 1, **more}
        with pytest.raises(
            ValueError, match=f"3d_fullres: modality_decoder_scale is {stages - 1}; .* 0 to {stages - 2}"
        ):
            planning.make_plans(stock, changes, ["3d_fullres"], "P", CHANNELS)
    plans = planning.make_plans(stock, {"modality_decoder_scale": stages - 2}, ["3d_fullres"], "P", CHANNELS)
    with pytest.raises(ValueError, match="early_fusion has no decoder"):
        planning.make_plans(plans, {"network_form": "early_fusion"}, ["3d_fullres"], "P", CHANNELS)
    early = planning.make_plans(plans, preset("early-fusion"), ["3d_fullres"], "P", CHANNELS)
    assert early["mgml"]["config"]["modality_decoder_scale"] is None
