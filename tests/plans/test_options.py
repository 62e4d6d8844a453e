"""`Options`: every option documented, checked, and stored without loss."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from builders import options_with
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.objective import Options, needs_of
from nnunetv2_mgml.objective.flat import MGMLConfig
from nnunetv2_mgml.plans import options as module
from nnunetv2_mgml.plans.options import (
    PLANS_KEY,
    NetworkOptions,
    OptionGroup,
    TrainerAttributes,
    all_groups,
    differences,
    option,
    parse_assignments,
)
from nnunetv2_mgml.plans.presets import PAPER, PRESETS, preset, presets

FIELDS = {field.name: field.metadata for group in all_groups() for field in dataclasses.fields(group)}


def good_values(name: str) -> st.SearchStrategy:
    """Values the declaration of an option allows."""
    metadata = FIELDS[name]
    if metadata["choices"]:
        return st.sampled_from(metadata["choices"])
    if name == "modality_missing_rate":
        return st.dictionaries(st.sampled_from(["t1", "t2", "dwi"]), st.floats(0, 0.99), max_size=3)
    if name == "fusion_options":
        return st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 9), max_size=2)
    low = metadata["low"] if metadata["low"] is not None else 0
    high = metadata["high"] if metadata["high"] is not None else low + 1000
    kinds = {
        int: st.integers(math.ceil(low), math.floor(high)),
        float: st.floats(low, high),
        bool: st.booleans(),
        str: st.just("mean"),
        type(None): st.none(),
    }
    return st.one_of(*(kinds[kind] for kind in metadata["kinds"]))


@pytest.mark.parametrize("name", FIELDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_option_survives_json(name, data):
    value = data.draw(good_values(name))
    if name == "sharpness_min":
        value = min(value, 19.0)  # must stay below sharpness_max
    if name == "sharpness_max":
        value = max(value, 1.0)
    needed = {"mask_sampling": "bernoulli"} if name == "modality_missing_rate" and value else {}
    if name in ("criterion", "mask_mode") and value == "published":
        needed = {"reading": "reference"}
    config = Options().updated({name: value, **needed})
    assert config.value(name) == value
    plans = json.loads(json.dumps({PLANS_KEY: {"config": config.as_dict()}}))
    assert Options.from_plans(plans) == config


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_refuses_another_type(name):
    wrong = [object(), (1, 2)]
    wrong += [] if str in FIELDS[name]["kinds"] else ["many"]
    wrong += [] if bool in FIELDS[name]["kinds"] else [True]
    wrong += [] if type(None) in FIELDS[name]["kinds"] else [None]
    for value in wrong:
        with pytest.raises(ValueError, match=f"option {name}"):
            Options().updated({name: value})


@pytest.mark.parametrize("name", [n for n, m in FIELDS.items() if m["low"] is not None or m["high"] is not None])
def test_limits_are_enforced_and_named(name):
    low, high = FIELDS[name]["low"], FIELDS[name]["high"]
    beyond = [] if low is None else [low - 1]
    beyond += [] if high is None else [high + 1]
    beyond += [math.nan] if float in FIELDS[name]["kinds"] else []
    for value in beyond:
        with pytest.raises(ValueError, match=r"[<>]= "):
            Options().updated({name: value})


@pytest.mark.parametrize("name", [n for n, m in FIELDS.items() if m["choices"]])
def test_choices_are_enforced_and_listed(name):
    with pytest.raises(ValueError, match="one of " + ", ".join(map(str, FIELDS[name]["choices"]))):
        Options().updated({name: "no such choice"})


def test_unknown_option_lists_all():
    with pytest.raises(ValueError, match=r"Unknown option tau\.") as error:
        Options().updated({"tau": 3})
    assert all(name in str(error.value) for name in FIELDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharpness_min": 5.0, "sharpness_max": 5.0}, "must be below"),
        (
            {"modality_missing_rate": {"t1": 0.2}},
            r"needs mask_sampling=bernoulli; with uniform_subset it would be ignored",
        ),
        ({"modality_missing_rate": {"t1": 1.0}}, r"'t1' must be a number in \[0, 1\)"),
        (
            {"mask_sampling": "bernoulli", "modality_missing_rate": {"t1ce": 0.1, "T1Gd": 0.9}},
            "names a modality twice: t1ce, T1Gd",
        ),
        ({"modality_missing_rate": {"t1": True}}, r"'t1' must be a number"),
        ({"modality_missing_rate": {"t1": "often"}}, r"'t1' must be a number"),
        (
            {"reading": "paper", "soft_label": "mean"},
            r"soft_label=mean needs reading=ours; got reading=paper, which allows soft_label=meta_amf or fixed or none",
        ),
        ({"reading": "reference", "soft_label": "mean"}, r"soft_label=mean needs reading=ours; got reading=reference"),
        (
            {"reading": "reference", "teaching": "better"},
            r"teaching=better needs reading=ours; got reading=reference, which allows teaching=everywhere",
        ),
        ({"reading": "paper", "rebalancing": "passion"}, r"rebalancing=passion needs reading=ours; got reading=paper"),
    ],
)
def test_options_that_depend_on_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        Options().updated(changes)


def test_whole_numbers_become_the_declared_type():
    config = Options().updated({"temperature": 3, "num_epochs": 20.0})
    assert type(config.value("temperature")) is float
    assert type(config.training.num_epochs) is int
    with pytest.raises(ValueError, match="num_epochs"):
        Options().updated({"num_epochs": 2.5})


def test_options_of_the_fusion_design_a_trainer_fixes():
    """Those of the same design win over the trainer's, those of another design are dropped; twice changes nothing."""
    fixed = {"fusion": "region_aware", "fusion_options": {"full_resolution_regions": True}, "soft_label": "none"}
    for planned, expected in (
        ({}, True),
        ({"fusion": "sfusion", "fusion_options": {"depth": 2}}, True),
        ({"fusion_options": {"full_resolution_regions": False}}, False),
    ):
        config = Options().updated({**planned, "num_epochs": 7}).overridden(fixed)
        assert config == options_with(
            fusion="region_aware", fusion_options={"full_resolution_regions": expected}, soft_label="none", num_epochs=7
        )
        assert config.overridden(fixed) == config
    kept = options_with(fusion="sfusion", fusion_options={"depth": 2})
    assert kept.overridden({"soft_label": "none"}).network.fusion_options == {"depth": 2}
    with pytest.raises(ValueError, match="Unknown option tau"):
        kept.overridden({"tau": 3})


def test_documentation_covers_every_option_once():
    documented = Options.documentation()
    assert [name for name, _, _ in documented] == list(FIELDS)
    for name, default, text in documented:
        assert json.loads(default) == Options().value(name)
        assert len(text) > 10, name


def test_frozen_and_mutable_defaults_are_not_shared():
    config = Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.network.width_factor = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.network = NetworkOptions()
    assert config.network.fusion_options is not Options().network.fusion_options


def test_stock_plans_give_the_defaults():
    assert Options.from_plans({"plans_name": "nnUNetPlans"}) == Options()


def test_parse_assignments():
    parsed = parse_assignments(["num_epochs=5", "fusion=mean", "seed=null", 'fusion_options={"k": 0.2}', "a=b=c"])
    assert parsed == {"num_epochs": 5, "fusion": "mean", "seed": None, "fusion_options": {"k": 0.2}, "a": "b=c"}
    for entries, message in ((["num_epochs"], "key=value"), (["=5"], "key=value"), (["a=1", "a=2"], "twice")):
        with pytest.raises(ValueError, match=message):
            parse_assignments(entries)


def test_import_is_light():
    code = (
        "import sys, nnunetv2_mgml.plans.options, nnunetv2_mgml.modalities, nnunetv2_mgml.upstream.registration;"
        "print([m for m in ('torch', 'nnunetv2', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names_are_unique_over_all_groups():
    names = [name for group in all_groups() for name in group.names()]
    assert len(set(names)) == len(names)
    assert tuple(names) == Options.names() == tuple(Options().as_dict())


def test_attributes_of_nnunets_trainer_are_those_that_are_set():
    assert Options().training.trainer_attributes() == {}
    changed = options_with(num_epochs=3, weight_decay=0.0, seed=1)
    assert changed.training.trainer_attributes() == {"num_epochs": 3, "weight_decay": 0.0}
    assert set(TrainerAttributes.names()) < set(type(changed.training).names())


def test_differences_of_two_groups():
    before, now = options_with(fusion="mean", seed=1), options_with(fusion="concat", decoder_convs=2, seed=2)
    assert differences(before.network, now.network) == [
        "fusion was 'mean', is now 'concat'",
        "decoder_convs was 1, is now 2",
    ]
    assert options_with(seed=1).network == options_with(seed=2).network


def test_plans_of_a_term_that_is_not_installed_say_so():
    plans = {PLANS_KEY: {"version": "0.9.1", "config": {"num_epochs": 3, "boundary_weight": 0.5}}}
    with pytest.raises(
        ValueError, match=r"Unknown option boundary_weight\. Allowed: .*0\.9\.1.*loss term of another package"
    ):
        Options.from_plans(plans)


def test_options_of_a_term_of_another_package_are_stored_where_they_are_used(monkeypatch):
    """Plans must not ask for a package just because it was installed when they were written."""

    @dataclasses.dataclass(frozen=True)
    class BoundaryOptions(OptionGroup):
        boundary_weight: float = option(0.0, "weight of the boundary term", low=0)

    ours = tuple(module.objective_groups())
    monkeypatch.setattr(module, "_objective_groups", lambda: (*ours, BoundaryOptions))
    assert "boundary_weight" in Options.names()
    assert "boundary_weight" not in Options().as_dict()
    changed = Options().updated({"boundary_weight": 1})
    assert changed.as_dict()["boundary_weight"] == 1.0
    assert changed.objective[BoundaryOptions].boundary_weight == 1.0
    assert Options.from_plans({PLANS_KEY: {"config": changed.as_dict()}}) == changed


def test_a_group_of_no_term_is_named():
    with pytest.raises(KeyError, match="NetworkOptions belongs to no registered loss term"):
        Options().objective[NetworkOptions]


def test_options_cannot_be_read_before_the_terms_are_known(monkeypatch):
    monkeypatch.setattr(module, "_objective_groups", None)
    with pytest.raises(RuntimeError, match=r"import it before options are read"):
        Options()


def test_presets():
    assert preset("paper") == PAPER
    papers = options_with(**{name: value for name, value in PAPER.items() if name in Options.names()})
    assert papers.updated(preset("nnunet")) == Options()
    for names in (["paper", "nnunet"], ["nnunet", "early-fusion", "paper"]):
        with pytest.raises(ValueError, match="Choose one of the presets nnunet and paper; they set the same"):
            presets(names)
    with pytest.raises(ValueError, match=", ".join(PRESETS)):
        preset("nnU-Net")


@pytest.mark.parametrize(
    ("plans", "names", "weight"),
    [
        (["paper"], ["nnunet"], 1.0),
        (["early-fusion"], ["nnunet"], 0.0),
        (["paper", "early-fusion"], ["nnunet"], 0.0),
        (["paper-losses"], ["nnunet"], 0.0),
        (["paper", "paper-losses"], ["nnunet"], 0.0),
        (["paper"], ["early-fusion", "nnunet"], 0.0),
        ([], ["early-fusion", "nnunet"], 0.0),
        ([], ["nnunet"], 1.0),
    ],
)
def test_nnunet_takes_back_what_paper_set_and_no_more(plans: list[str], names: list[str], weight: float) -> None:
    def only_ours(settings: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name in Options.names()}

    before = options_with(**only_ours(presets(plans)))
    now = before.updated(only_ours(presets(names, before)))
    assert now.value("complete_view_weight") == weight
    assert now.value("modality_decoder_scale") == (0 if "paper-losses" in plans else None)
    assert now.training == Options().training
    for name in ("reading", "soft_label"):
        assert now.value(name) == (presets(names).get(name) or before.value(name))
    early, losses = ("early-fusion" in (*plans, *names)), "paper-losses" in plans
    kept = "multi_encoder" if losses and "paper" in plans else "shared_encoder"
    assert now.value("network_form") == ("early_fusion" if early else kept)


def test_nnunet_takes_back_what_paper_set_not_what_plans_have_otherwise() -> None:
    """Plans of before, also with a setting that is the paper's too, and what was set over the preset."""

    def after(**options: Any) -> Options:
        before = options_with(**options)
        return before.updated({k: v for k, v in presets(["nnunet"], before).items() if k in Options.names()})

    def now(**options: Any) -> tuple[Any, Any]:
        found = after(**options)
        return found.value("modality_decoder_scale"), found.value("complete_view_weight")

    paper = {key: value for key, value in PAPER.items() if key in Options.names()}
    assert now(modality_decoder_scale=0) == (0, 1.0)
    assert now(modality_decoder_scale=0, optimizer="adam") == (0, 1.0)
    assert now(**paper) == (None, 1.0)
    assert now(**{**paper, "modality_decoder_scale": 2}) == (2, 1.0)
    assert now(**{**paper, "complete_view_weight": 0.5}) == (0, 0.5)
    assert after(network_form="multi_encoder").value("network_form") == "multi_encoder"
    assert after(complete_every=1, optimizer="adam").value("complete_every") == 1
    back = after(**paper)
    assert (back.value("network_form"), back.value("complete_every")) == ("shared_encoder", None)
    assert after(**{**paper, "network_form": "early_fusion"}).value("network_form") == "early_fusion"


def test_early_fusion_on_plans_of_another_design() -> None:
    planned = options_with(fusion="mmformer", fusion_options={"depth": 2}, rebalancing="passion")
    now = planned.updated(preset("early-fusion"))
    assert (now.network.fusion, now.network.fusion_options, now.value("rebalancing")) == ("concat", {}, "none")
    assert needs_of(now) == Needs()


def test_preset_of_one_network_asks_for_nothing_but_its_own_loss():
    """One pass of the trunk per step: no term needs the complete view, a teacher or single modalities."""
    options = options_with(**preset("early-fusion"))
    assert needs_of(options) == Needs()
    assert (options.network.network_form, options.network.width_factor) == ("early_fusion", 1.0)


def test_flat_names_of_version_0_1():
    config = MGMLConfig(fusion="mean", temperature=3)
    assert (config.fusion, config.temperature, config.mask_ratio) == ("mean", 3.0, 0.2)
    assert config.updated({"seed": 4}).seed == 4
    assert config.updated({"seed": 4}).temperature == 3.0
    assert config.network.fusion == "mean"
    assert MGMLConfig.from_plans({PLANS_KEY: {"config": config.as_dict()}}) == config
    assert config.overridden({"fusion": "concat"}).fusion == "concat"
    with pytest.raises(ValueError, match="Unknown option tau"):
        MGMLConfig(tau=3)
    with pytest.raises(AttributeError, match="tau"):
        _ = config.tau
