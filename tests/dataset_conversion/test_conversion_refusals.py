"""Conversion of BraTS folders: what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conversion_cases import SHAPE, needs_installation, rewrite, tree, with_array, write_cases

from nnunetv2_mgml.dataset_conversion import convert
from nnunetv2_mgml.dataset_conversion.convert import ConversionSummary, convert_brats
from nnunetv2_mgml.io.workers import WorkerDiedError, run_jobs


def _convert(source: Path, **options: object) -> ConversionSummary:
    return convert_brats(source, 137, num_processes=1, **options)


def _spoil(source: Path, names: list[str]) -> dict[str, str]:
    """Spoil every case but the last in its own way; return case -> text of its error."""

    def path(i: int, suffix: str) -> Path:
        return source / names[i] / f"{names[i]}{suffix}.nii.gz"

    def moved(image: sitk.Image) -> sitk.Image:
        image.SetOrigin((1.0, 2.0, 3.0))
        return image

    def stretched(image: sitk.Image) -> sitk.Image:
        image.SetSpacing((1.0, 1.0, 2.0))
        return image

    def turned(image: sitk.Image) -> sitk.Image:
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        return image

    rewrite(path(0, "_t2"), moved)
    rewrite(path(1, "_t2"), stretched)
    rewrite(path(2, "_seg"), turned)
    rewrite(path(3, "_flair"), lambda image: image[:, :, 1:])
    whole = path(4, "_t1ce").read_bytes()
    path(4, "_t1ce").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(path(5, "_t1").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 40] = b"x" * 40
    path(5, "_t1").write_bytes(bytes(damaged))
    path(6, "_seg").write_bytes(b"no image")
    rewrite(path(7, "_seg"), lambda image: with_array(image, sitk.GetArrayFromImage(image) + np.uint8(3)))
    rewrite(path(8, "_t1"), lambda image: with_array(image, np.full(SHAPE, np.nan, np.float32)))
    rewrite(path(9, "_seg"), lambda image: with_array(image, np.full(SHAPE, 0.5, np.float32)))
    plain = path(10, "_t1")
    sitk.WriteImage(sitk.ReadImage(str(plain)), str(plain.with_suffix("")))
    plain.unlink()
    plain.with_suffix("").write_bytes(plain.with_suffix("").read_bytes()[:2000])
    (source / "copy" / names[11]).mkdir(parents=True)
    (source / "copy" / names[11] / f"{names[11]}_t1.nii.gz").write_bytes(b"")
    rewrite(path(12, "_t1"), lambda image: sitk.JoinSeries([image, image]))
    texts = [
        "origin (1, 2, 3) instead of",
        "spacing (1, 1, 2) instead of (6, 5, 4)",
        "direction (-1, 0, 0, 0, -1, 0, 0, 0, 1)",
        "shape (15, 20, 18) instead of (16, 20, 18)",
        "_t1ce.nii.gz cannot be read",
        "_t1.nii.gz cannot be read",
        "_seg.nii.gz cannot be read",
        "_seg.nii.gz: unexpected label value(s)",
        f"_t1.nii.gz holds {np.prod(SHAPE)} voxels that are NaN or infinite",
        f"_seg.nii.gz holds {np.prod(SHAPE)} voxels that are no whole numbers, such as 0.5",
        "_t1.nii is cut off: it holds 2000 of",
        "found in several folders",
        "_t1.nii.gz has 4 axes, of size (18, 20, 16, 2); 3 are needed",
    ]
    return dict(zip(names, texts, strict=False))


@pytest.mark.parametrize("processes", [1, 2])
def test_all_bad_cases_are_listed_and_nothing_is_written(nnunet_folders: Path, tmp_path: Path, processes: int) -> None:
    if processes > 1:
        needs_installation()
    source = tmp_path / "src"
    names = write_cases(source, 16)
    expected = _spoil(source, names)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its lines are looked at below)
        convert_brats(source, 137, split="7:1:2", num_processes=processes)
    head, *lines = str(error.value).splitlines()
    assert head == "13 of 16 case(s) are bad; nothing has been written. --skip_bad converts the others."
    assert len(lines) == len(expected)
    for line, (name, text) in zip(lines, sorted(expected.items()), strict=True):
        assert line.startswith(f"  {name}: ")
        assert text in line
    assert tree(nnunet_folders / "raw") == []
    assert tree(nnunet_folders / "preprocessed") == []

    summary = convert_brats(source, 137, skip_bad=True, num_processes=processes)
    assert set(summary.skipped) == set(expected)
    assert summary.num_training == 3
    assert sorted(p.name for p in (summary.folder / "labelsTr").iterdir()) == [f"{n}.nii.gz" for n in names[13:]]
    assert json.loads((summary.folder / "dataset.json").read_text())["numTraining"] == 3


def test_target_rules(nnunet_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src"
    names = write_cases(source, 2)
    folder = _convert(source).folder
    assert folder.name == "Dataset137_BraTS"
    before = tree(folder)
    with pytest.raises(ValueError, match="Give --overwrite"):
        _convert(source)
    with pytest.raises(ValueError, match="id 137 is taken by Dataset137_BraTS"):
        _convert(source, name="Other")
    (nnunet_folders / "results" / "Dataset138_Else").mkdir()
    with pytest.raises(ValueError, match="id 138 is taken by Dataset138_Else"):
        convert_brats(source, 138)
    with pytest.raises(ValueError, match="lie within each other"):
        _convert(_inside(folder, source, names[0]), overwrite=True)
    (source / names[0] / f"{names[0]}_t1.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        _convert(source, overwrite=True)
    assert [entry for entry in tree(folder) if not entry.startswith("inner")] == before
    _convert(source, overwrite=True, skip_bad=True)
    assert sorted(p.name for p in (folder / "labelsTr").iterdir()) == [f"{names[1]}.nii.gz"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    for bad_id in (0, 1000):
        with pytest.raises(ValueError, match="1 to 999"):
            convert_brats(source, bad_id)
    with pytest.raises(ValueError, match="only have letters"):
        convert_brats(source, 139, "a b")
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(ValueError, match="nnUNet_raw is not set"):
        convert_brats(source, 139)


def test_a_source_with_links_into_the_target(nnunet_folders: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    first, *_ = write_cases(source, 2)
    folder = _convert(source).folder
    kept = folder / "kept"
    (source / first).rename(kept)
    (source / first).symlink_to(kept)
    with pytest.raises(ValueError, match=rf"5 file\(s\) to convert lie in .*, such as .*{first}"):
        _convert(source, overwrite=True)
    (kept / f"{first}_t1.nii.gz").rename(kept / f"{first}-t1n.nii.gz")  # now the case is bad
    with pytest.raises(ValueError, match=r"5 file\(s\) to convert lie in"):
        _convert(source, overwrite=True, skip_bad=True)
    assert len(list(kept.iterdir())) == 5


def _inside(folder: Path, source: Path, name: str) -> Path:
    target = folder / "inner" / name
    target.mkdir(parents=True)
    for path in (source / name).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return folder / "inner"


def test_interruption_leaves_the_old_dataset(
    nnunet_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cases(tmp_path / "src", 2)
    folder = _convert(tmp_path / "src").folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_description", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _convert(tmp_path / "src", overwrite=True)
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before


def _die(_: int) -> None:
    os._exit(1)


def test_death_of_a_worker_is_explained() -> None:
    with pytest.raises(WorkerDiedError, match=r"a worker process died.*\(-np; 0 works without any\)"):
        run_jobs(_die, [1, 2], 2, "", False)
