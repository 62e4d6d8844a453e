"""Training cases that lack modalities at given rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversion_cases import array_of, write_cases

from nnunetv2_mgml.dataset_conversion.convert import convert_brats
from nnunetv2_mgml.dataset_conversion.missing import check_rates, draw_missing, parse_rates
from nnunetv2_mgml.dataset_conversion.splits import published_lists
from nnunetv2_mgml.modalities import BRATS_CHANNELS

RATES = {"t1": 0.2, "t1ce": 0.4, "flair": 0.6, "t2": 0.8}


def test_rates() -> None:
    """Each modality by its rate given that one is left; never all; a case's subset is its own affair."""
    cases = [f"case_{i}" for i in range(20_000)]
    drawn = draw_missing(cases, RATES, 0)
    assert max(map(len, drawn.values())) == 3
    all_missing = 0.2 * 0.4 * 0.6 * 0.8
    for name, rate in RATES.items():
        share = sum(name in missing for missing in drawn.values()) / len(cases)
        assert share == pytest.approx((rate - all_missing) / (1 - all_missing), abs=0.015)
    assert draw_missing(cases[:50][::-1], RATES, 0) == {c: drawn[c] for c in cases[:50] if c in drawn}
    assert draw_missing(cases[:50], RATES, 1) != draw_missing(cases[:50], RATES, 0)
    assert draw_missing(cases, {}, 0) == {}


def test_passions_setting_keeps_about_as_many_cases() -> None:
    """219 training cases at 20, 40, 60 and 80 %: 184, 135, 90 and 43 are left in the published list."""
    lines = published_lists("rfnet2020")[0].read_text().splitlines()[1:]
    drawn = draw_missing(lines, RATES, 0)
    for name, kept in (("t1", 184), ("t1ce", 135), ("flair", 90), ("t2", 43)):
        assert len(lines) - sum(name in missing for missing in drawn.values()) == pytest.approx(kept, abs=25)


def test_parse_rates() -> None:
    assert parse_rates(["T1=0.2", "t1gd=0.5", "FLAIR=0"]) == {"t1": 0.2, "t1ce": 0.5, "flair": 0.0}
    assert parse_rates([]) == {}
    for bad in (["t1"], ["t1=1"], ["t1=-0.1"], ["dwi=0.1"], ["t1=0.1", "t1n=0.2"], ["t1=x"], ["t1=nan"]):
        with pytest.raises(ValueError, match="Bad missing rate"):
            parse_rates(bad)


def test_something_is_left_of_what_a_case_has() -> None:
    cases = [f"case_{i}" for i in range(200)]
    rates = dict.fromkeys(BRATS_CHANNELS, 0.8)
    have = dict.fromkeys(cases[::2], ("t1", "flair"))
    drawn = draw_missing(cases, rates, 0, have)
    assert {drawn[case] for case in cases[::2] if case in drawn} == {("t1",), ("flair",)}
    whole = draw_missing(cases, rates, 0)
    assert all(drawn.get(case) == whole.get(case) for case in cases[1::2])
    assert draw_missing(cases, dict.fromkeys(("t1", "flair"), 0.99), 0, dict.fromkeys(cases, ("t1",))) == {}


def test_rates_from_python_are_checked() -> None:
    assert check_rates({"T1": 0.2, "t1gd": 0}) == {"t1": 0.2, "t1ce": 0.0}
    for bad in ({"flare": 0.5}, dict.fromkeys(BRATS_CHANNELS, 1.0), {"t1": 0.1, "T1n": 0.1}, {"t1": None}):
        with pytest.raises(ValueError, match="Bad missing rate"):
            convert_brats("not looked at", 137, split="5:1:2", missing_rates=bad, num_processes=0)


def test_what_a_case_really_lacks_still_needs_missing_ok(nnunet_folders: Path, tmp_path: Path) -> None:
    """Only what was drawn is excused, and what is drawn leaves something."""
    names = write_cases(tmp_path / "src", 6)
    for name in names:
        (tmp_path / "src" / name / f"{name}_t1ce.nii.gz").unlink()
    options = {"split": "4:1:1", "missing_rates": dict.fromkeys(("T1", "t2", "flair"), 0.9), "num_processes": 0}
    with pytest.raises(ValueError, match=r"^6 of 6 case") as caught:
        convert_brats(tmp_path / "src", 137, **options)
    assert str(caught.value).count("no file for t1ce (allow with --missing_ok)") == 6
    summary = convert_brats(tmp_path / "src", 137, missing_ok=True, **options)
    lacking = [summary.missing[case] for case in summary.split.train]
    assert max(map(len, lacking)) == 3
    assert all("t1ce" in names for names in lacking)


def test_conversion(nnunet_folders: Path, tmp_path: Path) -> None:
    """Missing volumes are empty and listed, for training cases alone."""
    write_cases(tmp_path / "src", 8)
    source = tmp_path / "src"
    with pytest.raises(ValueError, match="--missing_rate is for the training part"):
        convert_brats(source, 137, num_processes=1, missing_rates=RATES)
    summary = convert_brats(source, 137, num_processes=1, split="5:1:2", missing_rates=RATES, seed=3)
    expected = draw_missing(summary.split.train, RATES, 3)
    assert expected
    stored = json.loads((summary.folder / "missing_modalities.json").read_text())
    assert {case: tuple(names) for case, names in stored.items()} == expected
    for case in (*summary.split.train, *summary.split.val):
        for channel, name in enumerate(BRATS_CHANNELS):
            image = array_of(summary.folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
            assert image.any() != (name in expected.get(case, ()))
