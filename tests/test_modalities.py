"""`modalities`: names, order, subsets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.modalities import (
    ALIASES,
    BRATS_CHANNELS,
    all_subsets,
    canonical_name,
    channel_index,
    channel_names,
    parse_subset,
    subset_from_missing,
    subset_from_present,
    subset_name,
    table_order,
    table_rows,
)

# the head of the paper's Table 3, one character per column: 1 = available
PAPER_TABLE_3 = {
    "flair": "100011100011101",
    "t1ce": "010010011011011",
    "t1": "001001010110111",
    "t2": "000100101101111",
}

channel_lists = st.lists(
    st.sampled_from([*BRATS_CHANNELS, "dwi", "adc", "swi", "ct", "pet"]), min_size=2, max_size=6, unique=True
)


@st.composite
def channels_and_subset(draw):
    channels = draw(channel_lists)
    subset = draw(st.lists(st.booleans(), min_size=len(channels), max_size=len(channels)).filter(any))
    return channels, tuple(subset)


@settings(max_examples=100, deadline=None)
@given(channels_and_subset(), st.randoms())
def test_subset_and_name_are_inverse(case, random):
    channels, subset = case
    name = subset_name(subset, channels)
    assert parse_subset(name, channels) == subset
    parts = name.split("+")
    random.shuffle(parts)
    assert parse_subset(",".join(part.upper() for part in parts), channels) == subset


@settings(max_examples=100, deadline=None)
@given(channels_and_subset())
def test_present_and_missing_say_the_same(case):
    channels, subset = case
    present = [c for c, there in zip(channels, subset, strict=True) if there]
    missing = [c for c in channels if c not in present]
    assert subset_from_present(present, channels) == subset_from_missing(missing, channels) == subset


@settings(max_examples=50, deadline=None)
@given(st.permutations(BRATS_CHANNELS), st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_table_order_is_the_papers_for_any_channel_order(channels, spelling):
    spelled = [ALIASES[c][i % len(ALIASES[c])].upper() for c, i in zip(channels, spelling, strict=True)]
    for channel, column in zip(channels, zip(*table_order(spelled), strict=True), strict=True):
        assert "".join(str(int(present)) for present in column) == PAPER_TABLE_3[channel]
    assert table_rows(spelled) == ("flair", "t1ce", "t1", "t2")


@settings(max_examples=20, deadline=None)
@given(channel_lists)
def test_table_order_holds_every_subset_once(channels):
    subsets = table_order(channels)
    assert len(subsets) == len(set(subsets)) == 2 ** len(channels) - 1
    assert set(subsets) == set(all_subsets(len(channels)))
    assert [sum(s) for s in subsets] == sorted(sum(s) for s in subsets)


@pytest.mark.parametrize("number", range(1, 8))
def test_all_subsets(number):
    subsets = all_subsets(number)
    binary = {tuple(bool(i >> bit & 1) for bit in range(number)) for i in range(1, 2**number)}
    assert len(subsets) == 2**number - 1
    assert set(subsets) == binary
    assert subsets[-1] == (True,) * number


def test_all_subsets_needs_a_modality():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        all_subsets(0)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("T1", "t1"),
        ("t1n", "t1"),
        ("T1w", "t1"),
        ("T1Gd", "t1ce"),
        ("t1-post", "t1ce"),
        ("T1c", "t1ce"),
        ("T1CE", "t1ce"),
        ("T2w", "t2"),
        ("T2-FLAIR", "flair"),
        ("t2f", "flair"),
        ("T2_Flair", "flair"),
        ("FLAIR", "flair"),
        ("DWI", "dwi"),
        ("b-1000", "b1000"),
        ("T1加权", "t1加权"),
        ("Диффузия", "диффузия"),
    ],
)
def test_canonical_name(spelling, name):
    assert canonical_name(spelling) == name
    assert canonical_name(name) == name


def test_no_alias_names_two_modalities():
    spellings = [alias for aliases in ALIASES.values() for alias in aliases]
    assert len(spellings) == len(set(spellings))


def test_channel_names_go_by_index_not_by_position():
    names = {"10": "c10", "2": "Flair", "0": "T1", "1": "t1Gd", **{str(i): f"c{i}" for i in range(3, 10)}}
    assert channel_names({"channel_names": names})[:3] == ("t1", "t1ce", "flair")
    assert channel_names({"channel_names": names})[10] == "c10"
    assert channel_names({"modality": {"0": "DWI", "1": "ADC"}}) == ("dwi", "adc")
    assert channel_names({"channel_names": {"0": "平扫", "1": "增强"}}) == ("平扫", "增强")


@pytest.mark.parametrize(
    ("dataset_json", "message"),
    [
        ({}, "neither 'channel_names' nor 'modality'"),
        ({"channel_names": {"0": "T1", "2": "T2"}}, r"numbered 0 to 1, found \[0, 2\]"),
        ({"channel_names": {"0": "T1c", "1": "T1Gd"}}, "same modality twice: t1ce"),
        ({"channel_names": {"0": "T1c", "1": "T2", "2": "T1Gd"}}, r"twice: t1ce \('T1c', 'T1Gd'\). Every"),
        ({"channel_names": {"0": "T1", "1": "?"}}, "at least one letter or digit each: 1 '\\?' has none."),
        ({"channel_names": {"T1": "0", "1": "T2"}}, r'are channel numbers, found T1. Write, for example, {"0": "T1"'),
    ],
)
def test_channel_names_errors(dataset_json, message):
    with pytest.raises(ValueError, match=message):
        channel_names(dataset_json)


def test_unknown_modality_names_what_the_model_has():
    with pytest.raises(ValueError, match=r"'pet'.*t1 \(also t1n/t1w\), dwi"):
        channel_index("pet", ("t1", "dwi"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subset_from_present([], ("t1", "t2")), "At least one of t1, t2"),
        (lambda: parse_subset(" + ", ("t1", "t2")), "At least one of t1, t2"),
        (lambda: subset_from_missing(["T1n", "T2w"], ("t1", "t2")), "All modalities are named as missing"),
        (lambda: subset_from_missing(["ct"], ("t1", "t2")), "Unknown modality 'ct'"),
        (lambda: parse_subset("t1+ct", ("t1", "t2")), "Unknown modality 'ct'"),
    ],
)
def test_subset_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_all_is_a_subset_name():
    assert parse_subset("ALL", ("t1", "t2")) == (True, True)
