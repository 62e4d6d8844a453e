"""`MGMLConfig`: every option documented, checked, and stored without loss."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.plans.options import PLANS_KEY, MGMLConfig, parse_assignments

FIELDS = {field.name: field.metadata for field in dataclasses.fields(MGMLConfig)}


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
    config = MGMLConfig().updated({name: value, **needed})
    assert getattr(config, name) == value
    plans = json.loads(json.dumps({PLANS_KEY: {"config": config.as_dict()}}))
    assert MGMLConfig.from_plans(plans) == config


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_refuses_another_type(name):
    wrong = [object(), (1, 2)]
    wrong += [] if str in FIELDS[name]["kinds"] else ["many"]
    wrong += [] if bool in FIELDS[name]["kinds"] else [True]
    wrong += [] if type(None) in FIELDS[name]["kinds"] else [None]
    for value in wrong:
        with pytest.raises(ValueError, match=f"option {name}"):
            MGMLConfig().updated({name: value})


@pytest.mark.parametrize("name", [n for n, m in FIELDS.items() if m["low"] is not None or m["high"] is not None])
def test_limits_are_enforced_and_named(name):
    low, high = FIELDS[name]["low"], FIELDS[name]["high"]
    beyond = [] if low is None else [low - 1]
    beyond += [] if high is None else [high + 1]
    beyond += [math.nan] if float in FIELDS[name]["kinds"] else []
    for value in beyond:
        with pytest.raises(ValueError, match=r"[<>]= "):
            MGMLConfig().updated({name: value})


@pytest.mark.parametrize("name", [n for n, m in FIELDS.items() if m["choices"]])
def test_choices_are_enforced_and_listed(name):
    with pytest.raises(ValueError, match="one of " + ", ".join(map(str, FIELDS[name]["choices"]))):
        MGMLConfig().updated({name: "no such choice"})


def test_unknown_option_lists_all():
    with pytest.raises(ValueError, match=r"Unknown option tau\.") as error:
        MGMLConfig().updated({"tau": 3})
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
        MGMLConfig().updated(changes)


def test_whole_numbers_become_the_declared_type():
    config = MGMLConfig().updated({"temperature": 3, "num_epochs": 20.0})
    assert type(config.temperature) is float
    assert type(config.num_epochs) is int
    with pytest.raises(ValueError, match="num_epochs"):
        MGMLConfig().updated({"num_epochs": 2.5})


def test_options_of_the_fusion_design_a_trainer_fixes():
    """Those of the same design win over the trainer's, those of another design are dropped; twice changes nothing."""
    fixed = {"fusion": "region_aware", "fusion_options": {"full_resolution_regions": True}, "soft_label": "none"}
    for planned, expected in (
        ({}, True),
        ({"fusion": "sfusion", "fusion_options": {"depth": 2}}, True),
        ({"fusion_options": {"full_resolution_regions": False}}, False),
    ):
        config = MGMLConfig().updated({**planned, "num_epochs": 7}).overridden(fixed)
        assert config == MGMLConfig(
            fusion="region_aware", fusion_options={"full_resolution_regions": expected}, soft_label="none", num_epochs=7
        )
        assert config.overridden(fixed) == config
    kept = MGMLConfig(fusion="sfusion", fusion_options={"depth": 2})
    assert kept.overridden({"soft_label": "none"}).fusion_options == {"depth": 2}
    with pytest.raises(ValueError, match="Unknown option tau"):
        kept.overridden({"tau": 3})


def test_documentation_covers_every_option_once():
    documented = MGMLConfig.documentation()
    assert [name for name, _, _ in documented] == list(FIELDS)
    for name, default, text in documented:
        assert json.loads(default) == getattr(MGMLConfig(), name)
        assert len(text) > 10, name


def test_frozen_and_mutable_defaults_are_not_shared():
    config = MGMLConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 1.0
    assert config.fusion_options is not MGMLConfig().fusion_options


def test_stock_plans_give_the_defaults():
    assert MGMLConfig.from_plans({"plans_name": "nnUNetPlans"}) == MGMLConfig()


def test_terms_that_are_off():
    assert not MGMLConfig().updated({"soft_label": "none"}).uses_soft_label
    assert not MGMLConfig().updated({"soft_label_weight": 0}).uses_soft_label
    assert not MGMLConfig().updated({"consistency_weight": 0}).uses_teacher
    assert not MGMLConfig(mask_sampling="fixed").uses_teacher
    assert MGMLConfig(mask_sampling="fixed", reading="paper").uses_teacher  # counts every sample, dropout on or off
    assert MGMLConfig().uses_soft_label
    assert MGMLConfig().uses_teacher
    assert MGMLConfig().supervises_teacher
    assert not MGMLConfig(mask_sampling="fixed").supervises_teacher  # the student sees everything there is


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
