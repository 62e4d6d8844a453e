"""Phantoms: reproducible, in the layouts of BraTS, and as ambiguous per sequence as real tumours."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnunetv2_mgml.modalities import BRATS_CHANNELS
from nnunetv2_mgml.phantom import Difficulty, Phantom, make_case, make_phantom, write_phantoms
from nnunetv2_mgml.phantom.tumor import EDEMA, ENHANCING, NECROSIS

SHAPE = (32, 36, 32)


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(np.random.default_rng([11, i]), SHAPE) for i in range(40)]


def _digest(seed: int, number: int) -> str:
    images, labels = make_case(np.random.default_rng([seed, number]), (16, 16, 16))
    return hashlib.sha256(b"".join(images[m].tobytes() for m in BRATS_CHANNELS) + labels.tobytes()).hexdigest()


def test_same_seed_same_case_in_another_process() -> None:
    script = "from test_phantom import _digest; print(_digest(3, 4))"
    other = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join([str(Path(__file__).parents[1]), *filter(None, sys.path)])},
    )
    assert other.stdout.strip() == _digest(3, 4)
    assert len({_digest(3, 4), _digest(3, 5), _digest(4, 4)}) == 3


def test_more_cases_extend_a_set(tmp_path: Path) -> None:
    few = write_phantoms(tmp_path / "few", 2, 8, (16, 16, 16))
    more = write_phantoms(tmp_path / "more", 3, 8, (16, 16, 16))
    last = write_phantoms(tmp_path / "last", 1, 8, (16, 16, 16), first=2)
    for a, b in zip([*few, *last], more, strict=True):
        assert a.name == b.name
        for path in a.iterdir():
            np.testing.assert_array_equal(*(sitk.GetArrayFromImage(sitk.ReadImage(str(f / path.name))) for f in (a, b)))


@pytest.mark.parametrize(
    ("layout", "case", "suffixes", "values"),
    [
        ("brats2021", "Phantom_00001", ("_t1", "_t1ce", "_t2", "_flair", "_seg"), {0, 1, 2, 4}),
        ("brats2023", "Phantom-00001-000", ("-t1n", "-t1c", "-t2w", "-t2f", "-seg"), {0, 1, 2, 3}),
    ],
)
def test_layouts(tmp_path: Path, layout: str, case: str, suffixes: tuple[str, ...], values: set[int]) -> None:
    shape, spacing = (18, 24, 20), (3.0, 2.0, 1.5)
    folders = write_phantoms(tmp_path, 6, 0, shape, spacing, layout)
    assert folders[1] == tmp_path / case
    assert sorted(path.name for path in folders[1].iterdir()) == sorted(f"{case}{s}.nii.gz" for s in suffixes)
    found = set()
    for folder in folders:
        for path in folder.iterdir():
            image = sitk.ReadImage(str(path))
            assert image.GetSize() == shape[::-1]
            assert image.GetSpacing() == pytest.approx(spacing[::-1])
            if "seg" in path.name:
                assert image.GetPixelID() == sitk.sitkUInt8
                found |= set(np.unique(sitk.GetArrayViewFromImage(image)).tolist())
            else:
                assert image.GetPixelID() == sitk.sitkInt16
                assert sitk.GetArrayViewFromImage(image).min() == 0
    assert found == values


def test_arrays(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        assert tuple(phantom.images) == BRATS_CHANNELS
        brain = phantom.anatomy.brain
        assert 0.15 < brain.mean() < 0.45
        assert ndimage.label(brain)[1] == 1
        assert phantom.labels.dtype == np.uint8
        assert phantom.labels.shape == SHAPE
        np.testing.assert_allclose(phantom.anatomy.tissue.sum(0)[brain], 1, rtol=1e-5)
        for image in phantom.images.values():
            assert image.dtype == np.float32
            np.testing.assert_array_equal(image > 0, brain)


def test_tumours(phantoms: list[Phantom]) -> None:
    """Within the brain, core within edema, sizes like those of real cases, some without enhancement, some twofold."""
    volumes, without, several = [], 0, 0
    for phantom in phantoms:
        labels, brain = phantom.labels, phantom.anatomy.brain
        assert labels.any()
        assert not labels[~brain].any()
        assert set(np.unique(labels)) <= {0, NECROSIS, EDEMA, ENHANCING}
        core = np.isin(labels, (NECROSIS, ENHANCING))
        assert core.any()
        parts, count = ndimage.label(labels > 0)
        assert all(core[parts == i].any() for i in range(1, count + 1))
        volumes.append((labels > 0).sum() / brain.sum())
        without += ENHANCING not in labels
        several += count > 1
    assert 0.03 < np.median(volumes) < 0.12
    assert min(volumes) > 0.002
    assert max(volumes) < 0.35
    assert 3 <= without <= 18
    assert 1 <= several <= 15


def _contrast(phantoms: list[Phantom], name: str, mask: str | int) -> float:
    """Median over cases of (mean in a region - mean of white matter) / (mean of white matter)."""
    values = []
    for phantom in phantoms:
        anatomy = phantom.anatomy
        healthy = (phantom.labels == 0) & (anatomy.lesions + anatomy.cavities + anatomy.vessels < 0.02)
        white = healthy & (anatomy.tissue[0] > 0.95)
        region = {
            "grey": healthy & (anatomy.tissue[1] > 0.9),
            "fluid": healthy & (anatomy.tissue[2] > 0.75),
            "lesion": (phantom.labels == 0) & (anatomy.lesions > 0.8),
            "vessel": (phantom.labels == 0) & (anatomy.vessels > 0.5),
        }.get(mask, phantom.labels == mask)
        region = region & anatomy.brain
        if region.sum() > 3:
            image = phantom.images[name]
            values.append(image[region].mean() / image[white].mean() - 1)
    assert len(values) >= 5
    return float(np.median(values))


@pytest.mark.parametrize(
    ("name", "order"),
    [("t1", ["fluid", "grey"]), ("t1ce", ["fluid", "grey"]), ("t2", ["grey", "fluid"]), ("flair", ["fluid", "grey"])],
)
def test_healthy_tissue_has_the_ranks_of_real_mri(phantoms: list[Phantom], name: str, order: list[str]) -> None:
    first, second = (_contrast(phantoms, name, tissue) for tissue in order)
    assert first < second
    if name in ("t1", "t1ce"):
        assert second < -0.1  # white matter is brightest
    else:
        assert max(first, second) > 0.1
    if name == "flair":
        assert first < -0.3  # dark fluid


def test_each_region_shows_in_its_sequences(phantoms: list[Phantom]) -> None:
    assert _contrast(phantoms, "flair", EDEMA) > 0.35
    assert _contrast(phantoms, "t2", EDEMA) > 0.45
    assert -0.35 < _contrast(phantoms, "t1", EDEMA) < -0.08
    assert _contrast(phantoms, "t1ce", ENHANCING) > 0.2
    assert abs(_contrast(phantoms, "t1", ENHANCING) - _contrast(phantoms, "t1", EDEMA)) < 0.12  # not told apart in T1
    assert abs(_contrast(phantoms, "t2", ENHANCING) - _contrast(phantoms, "t2", EDEMA)) < 0.45
    assert _contrast(phantoms, "t1", NECROSIS) < _contrast(phantoms, "t1", EDEMA) - 0.05
    assert _contrast(phantoms, "t2", NECROSIS) > 0.5


def test_distractors_look_like_tumour_in_one_sequence(phantoms: list[Phantom]) -> None:
    assert np.mean([(p.anatomy.lesions > 0.5).any() for p in phantoms]) > 0.8
    assert np.mean([(p.anatomy.vessels > 0.5).any() for p in phantoms]) > 0.8
    assert 0.1 < np.mean([(p.anatomy.cavities > 0.5).any() for p in phantoms]) < 0.8
    assert _contrast(phantoms, "flair", "lesion") > 0.3
    assert _contrast(phantoms, "t2", "lesion") > 0.3
    assert _contrast(phantoms, "t1ce", "vessel") > 0.2
    assert _contrast(phantoms, "t1", "vessel") < 0.05


def test_difficulty_acts_as_described() -> None:
    def draw(**factors: float) -> list[Phantom]:
        return [make_phantom(np.random.default_rng([1, i]), SHAPE, Difficulty(**factors)) for i in range(8)]

    contrasts = [_contrast(draw(tumor_contrast=c), "flair", EDEMA) for c in (0.2, 0.6, 1.0)]
    assert contrasts[0] < contrasts[1] - 0.1 < contrasts[2] - 0.2
    plain = draw(distractors=0)
    assert not any(p.anatomy.lesions.any() or p.anatomy.vessels.any() or p.anatomy.cavities.any() for p in plain)

    def spread(phantoms: list[Phantom]) -> float:
        return float(np.std([p.anatomy.brain.sum() for p in phantoms]))

    assert spread(draw(anatomy=0.2)) < spread(draw(anatomy=2))

    def roughness(phantoms: list[Phantom]) -> float:
        return float(
            np.mean(
                [
                    np.abs(np.diff(p.images["t1"], axis=2))[p.anatomy.tissue[0][..., 1:] > 0.99].mean()
                    / p.images["t1"][p.anatomy.tissue[0] > 0.99].mean()
                    for p in phantoms
                ]
            )
        )

    assert roughness(draw(noise=0)) < roughness(draw(noise=1)) < roughness(draw(noise=3))


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tumor_contrast must be 0 to 1, got 2"):
        Difficulty(tumor_contrast=2)
    with pytest.raises(ValueError, match="at least 16 voxels"):
        make_case(np.random.default_rng(0), (8, 32, 32))
    with pytest.raises(ValueError, match="Allowed: brats2021, brats2023"):
        write_phantoms(tmp_path, 1, 0, layout="isles")
    with pytest.raises(ValueError, match="num_cases of at least 1"):
        write_phantoms(tmp_path, 0, 0)
    write_phantoms(tmp_path, 1, 0, (16, 16, 16))
    with pytest.raises(ValueError, match="Phantom_00000 exists"):
        write_phantoms(tmp_path, 1, 0, (16, 16, 16))
    assert [path.name for path in tmp_path.iterdir()] == ["Phantom_00000"]
