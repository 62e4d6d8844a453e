"""Fuzzing what comes from a disk: every input gives the right result or one clear error, and nothing else.

``make fuzz`` runs thousands of examples; the gate a few hundred.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import SimpleITK as sitk
from conversion_cases import array_of, write_cases
from evaluation_cases import CHANNELS, DATASET_JSON, REGIONS, write_labels
from inference_cases import write_model
from report_cases import write_evaluation

from nnunetv2_mgml.dataset_conversion.back import convert_back
from nnunetv2_mgml.dataset_conversion.convert import convert_brats
from nnunetv2_mgml.dataset_conversion.labels import allowed_values, to_nnunet
from nnunetv2_mgml.inference.earlier import Earlier
from nnunetv2_mgml.inference.inputs import find_cases, resolve
from nnunetv2_mgml.inference.subset_quality import (
    REPORT_NAME,
    expected_quality,
    quality_line,
    quality_terms,
    unreliable_regions,
)
from nnunetv2_mgml.io.volumes import not_finished, read_label_image
from nnunetv2_mgml.modalities import all_subsets, subset_name
from nnunetv2_mgml.plans.model_files import check_dataset_json, check_plans, read_model_files
from nnunetv2_mgml.plans.regions import check_regions
from nnunetv2_mgml.scoring.cases import CaseTask, ScoringSettings, score_case
from nnunetv2_mgml.scoring.regions import label_set
from nnunetv2_mgml.scoring.results import load_evaluation

EXAMPLES = int(os.environ.get("MGML_FUZZ_EXAMPLES", "300"))
SEED = int(os.environ.get("MGML_FUZZ_SEED", "0"))
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3.5,
    1e308,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "t1",
    "../../etc",
    "\x00",
    "os.system",
    "a" * 300,
    "ü\ud800",
    [],
    [0],
    [[1]],
    ["x"],
    {},
    {"0": 1},
    {"a": {"b": []}},
]

Outcome = Counter[str]


@pytest.fixture
def outcomes() -> Iterator[Outcome]:
    """Counts what became of the examples; both a right result and an error must have been seen."""
    counted: Outcome = Counter()
    yield counted
    sys.stdout.write(f"{dict(counted)}\n")  # pytest -rP shows it
    assert sum(counted.values()) > 0
    assert counted["right"] > 0
    assert counted["error"] > 0


def attempt(outcomes: Outcome, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; only an error that a user can read is caught and counted."""
    try:
        result = function(*arguments)
    except (ValueError, FileNotFoundError) as error:
        if not can_be_read(error):
            raise
        outcomes["error"] += 1
        return None
    outcomes["right"] += 1
    return result


def can_be_read(error: Exception) -> bool:
    """Whether an error was written for users: not one that Python or a library raised by accident."""
    text = str(error)
    accidents = (type(error).__name__, "object is not", "has no attribute", "unhashable")
    return len(text) > 20 and not any(words in text for words in accidents)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside JSON content, but the whole."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(content: Any, rng: np.random.Generator) -> Any:
    """Replace, remove or add a value somewhere in JSON content; once in twenty the whole."""
    if rng.random() < 0.05:
        return STRANGE[rng.integers(len(STRANGE))]
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 3)):
        paths = list(places(content))
        if not paths:
            break
        *parents, last = paths[rng.integers(len(paths))]
        place = content
        for key in parents:
            place = place[key]
        kind = rng.integers(6)
        if kind == 0:
            del place[last]
        elif kind == 1 and isinstance(place, dict):
            place[f"more{rng.integers(9)}"] = STRANGE[rng.integers(len(STRANGE))]
        elif kind == 2 and isinstance(place[last], str):
            place[last] = place[last].upper()  # often as good as before
        else:
            place[last] = copy.deepcopy(STRANGE[rng.integers(len(STRANGE))])
    return content


def put(file: Path, content: Any, rng: np.random.Generator) -> None:
    """Write JSON; now and then cut off, or with bytes that are no text."""
    data = json.dumps(content).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        data = data[: rng.integers(len(data) + 1)]
    if rng.random() < 0.05:
        data = b"\xff" + data
    file.write_bytes(data)


def test_model_folders(tmp_path: Path, outcomes: Outcome) -> None:
    rng = np.random.default_rng([SEED, 1])
    model = write_model(tmp_path / "model")
    good = {name: json.loads((model / name).read_text()) for name in ("plans.json", "dataset.json")}
    for _ in range(max(EXAMPLES // 3, 50)):  # whoever looks for classes looks through nnU-Net's folders
        spoiled = ("plans.json", "dataset.json")[rng.integers(2)]
        for name, content in good.items():
            put(model / name, mutated(content, rng) if name == spoiled else content, rng)
        found = attempt(outcomes, read_model_files, model)
        if found is not None:  # what passes keeps what it promises
            check_plans(found[0], len(CHANNELS) if spoiled == "plans.json" else len(found[1]["channel_names"]))
            check_dataset_json(found[1])
            attempt(outcomes, label_set, found[1])
            attempt(outcomes, check_regions, found[1])
    assert outcomes["error"] > EXAMPLES / 12


def test_evaluations(tmp_path: Path, outcomes: Outcome) -> None:
    rng = np.random.default_rng([SEED, 2])
    folder = tmp_path / "evaluation"
    write_evaluation(folder, ["a", "b"], info={"model": {"folder": "m", "folds": ["0"]}, "source": {"kind": "folder"}})
    summary = json.loads((folder / "summary.json").read_text())
    table = (folder / "results.csv").read_text().splitlines()
    for _ in range(max(EXAMPLES // 3, 50)):
        put(folder / "summary.json", mutated(summary, rng) if rng.random() < 0.7 else summary, rng)
        lines = list(table)
        if rng.random() < 0.5:
            number = int(rng.integers(len(lines)))
            cells = lines[number].split(",")
            cells[rng.integers(len(cells))] = str(STRANGE[rng.integers(len(STRANGE))]).replace("\ud800", "?")
            lines[number] = ",".join(cells)
            lines += [lines[rng.integers(len(lines))]] if rng.random() < 0.2 else []
        (folder / "results.csv").write_text("\n".join(lines), encoding="utf-8")
        evaluation = attempt(outcomes, load_evaluation, folder)
        if evaluation is not None:
            for metric in evaluation.metrics:
                for region in evaluation.region_names:
                    evaluation.summary(metric, region)


def test_reports_that_predictions_quote(tmp_path: Path, outcomes: Outcome) -> None:
    rng = np.random.default_rng([SEED, 3])
    entry = {"mean": 0.8, "sd": 0.1, "n": 3}
    names = [subset_name(s, CHANNELS) for s in all_subsets(4)]
    report = {
        "channels": list(CHANNELS),
        "folds": ["0"],
        "checkpoint": "checkpoint_final.pth",
        "mirroring": False,
        "shared_preprocessing": False,
        "min_region_voxels": {"ET": 5},
        "policy": "brats",
        "subsets": {name: {"WT": dict(entry), "ET": {**entry, "mean": 0.2}} for name in names},
    }
    prediction = {"cases": {"a": {"status": "predicted"}, "b": {"status": "failed", "error": "x"}}, "model": {}}
    for _ in range(EXAMPLES):
        put(tmp_path / REPORT_NAME, mutated(report, rng), rng)
        subset = all_subsets(4)[rng.integers(15)]
        found = attempt(outcomes, expected_quality, tmp_path, subset)
        if found is not None:
            quality_line(tmp_path, subset)
            quality_terms(tmp_path)
            unreliable_regions(tmp_path, subset)
        put(tmp_path / "mgml_prediction.json", mutated(prediction, rng), rng)
        earlier = Earlier(tmp_path)
        assert all(isinstance(case, dict) for case in earlier.cases.values())
        assert earlier.unfinished <= set(earlier.cases)
        attempt(outcomes, earlier.refuse_other_settings, {"folds": [0]}, CHANNELS, earlier.cases)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_label_maps_of_damaged_disks(tmp_path: Path, outcomes: Outcome, ending: str) -> None:
    """Cut off anywhere, never read as if they were whole; in compressed files a changed byte is found, too."""
    rng = np.random.default_rng([SEED, 4])
    labels = rng.integers(0, 4, (6, 7, 8)).astype(np.uint8)
    file = write_labels(tmp_path / f"a{ending}", labels)
    whole = file.read_bytes()
    image = write_labels(tmp_path / f"image{ending}", labels)
    for number in range(max(EXAMPLES // 10, 20)):
        data = bytearray(whole)
        if number and (rng.random() < 0.5 or ending != ".nii.gz"):
            data = data[: rng.integers(len(data) + 1)]
        elif number:
            data[rng.integers(10, len(data))] ^= 1 << int(rng.integers(8))  # the first ten bytes are gzip's own
        file.write_bytes(bytes(data))
        found = attempt(outcomes, read_label_image, file, "a")
        assert (found is not None) == (not not_finished(file, image))
        if found is not None:
            np.testing.assert_array_equal(found.labels, labels)


def test_names_in_a_folder_of_images(tmp_path: Path, outcomes: Outcome) -> None:
    """A file with a channel number is used, or named in an error or a warning; none is dropped without a word."""
    rng = np.random.default_rng([SEED, 5])
    endings = [".nii.gz", ".nii.gz", ".nii.gz", ".NII.GZ", ".nii", ".mha", ".txt", ".nii.gz.tmp", ""]
    stems = ["a", "b", "a b", "a_0001", "ü", ".a", "a_0000_x", "-i"]
    for number in range(EXAMPLES):
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(rng.integers(0, 7)):
            channel = rng.integers(0, 6)
            name = f"{stems[rng.integers(len(stems))]}_{channel:04d}{endings[rng.integers(len(endings))]}"
            (folder / name).touch()
        cases = attempt(outcomes, find_cases, folder, ".nii.gz", CHANNELS)
        missing = ["auto", None, "t1", ["auto", "t2"]][rng.integers(4)]
        used = set()
        for case in cases or ():
            subset = attempt(outcomes, resolve, case, missing, CHANNELS)
            if subset is not None:
                assert any(subset)
                assert all(c in case.files for c, visible in enumerate(subset) if visible)
            used |= {os.path.basename(path) for path in case.files.values()}
            used |= {name for name in os.listdir(folder) if any(name in text for _, text in case.problems)}
        if cases is not None:
            there = {n for n in os.listdir(folder) if n.lower().endswith((".nii.gz", ".mha")) and n[0] != "."}
            assert there <= used


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Written anew, with BraTS's rule for empty regions."""
    total = int(a.sum() + b.sum())
    return 1.0 if total == 0 else 2 * int((a & b).sum()) / total


def test_scores_of_any_label_map(tmp_path: Path, outcomes: Outcome) -> None:
    """Whatever data type and values: the Dice that NumPy gives, or an error that names the case."""
    rng = np.random.default_rng([SEED, 6])
    settings = ScoringSettings(label_set(DATASET_JSON), "brats", ("dice",))
    types = [np.uint8, np.int16, np.float32, np.float64, np.int32]
    for _ in range(max(EXAMPLES // 4, 40)):
        maps = []
        for name in ("reference", "prediction"):
            labels = rng.integers(0, rng.integers(1, 5), (3, 4, 5)).astype(types[rng.integers(len(types))])
            if rng.random() < 0.15:
                labels.flat[rng.integers(labels.size)] = [4, 255, 100][rng.integers(3)]
            if rng.random() < 0.1 and labels.dtype.kind == "f":
                labels.flat[0] = [np.nan, 0.5, np.inf, 2.9999998][rng.integers(4)]
            shape = labels[:-1] if rng.random() < 0.05 else labels
            write_labels(tmp_path / f"{name}.nii.gz", shape, (1.0, 1.0, 1.0 if rng.random() > 0.05 else 1.5))
            maps.append(labels)
        task = CaseTask("case_x", tmp_path / "reference.nii.gz", {"t1": tmp_path / "prediction.nii.gz"})
        scores = attempt(outcomes, score_case, task, settings)
        if scores is not None:
            for region, members in REGIONS.items():
                expected = dice(*(np.isin(labels, members) for labels in maps))
                assert scores["t1"][region]["dice"] == pytest.approx(expected, abs=1e-12)


def test_conversion_there_and_back(nnunet_folders: Path, tmp_path: Path, outcomes: Outcome) -> None:
    """Spoiled segmentations and images: the values of the table, or an error; and back what it was."""
    rng = np.random.default_rng([SEED, 7])
    (name,) = write_cases(tmp_path / "src", 1)
    folder = tmp_path / "src" / name
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    truth = folder / f"{name}_seg.nii.gz"
    shape = array_of(truth).shape
    for _ in range(max(EXAMPLES // 12, 20)):
        for path, data in whole.items():
            path.write_bytes(data)
        values = rng.choice([0, 1, 2, 4], shape).astype([np.uint8, np.int16, np.float32][rng.integers(3)])
        kind = rng.integers(6)
        if kind == 0:
            values.flat[rng.integers(values.size)] = [3, 5, 255][rng.integers(3)]
        image = sitk.GetImageFromArray(values)
        image.CopyInformation(sitk.ReadImage(str(truth)))
        if kind == 1:
            image.SetOrigin((5.0, 0.0, 0.0))
        sitk.WriteImage(image, str(truth))
        spoil = list(whole)[rng.integers(len(whole))]
        if kind == 2:
            spoil.write_bytes(spoil.read_bytes()[: rng.integers(200)])
        if kind == 3:
            spoil.unlink()

        def convert() -> Any:
            return convert_brats(tmp_path / "src", 137, name="Fuzz", overwrite=True, num_processes=0)

        summary = attempt(outcomes, convert)
        if summary is not None:
            labels = summary.folder / "labelsTr"
            np.testing.assert_array_equal(array_of(labels / f"{name}.nii.gz"), to_nnunet(values, "brats2021"))
            convert_back(labels, tmp_path / "back", "brats2021", overwrite=True, num_processes=0)
            np.testing.assert_array_equal(array_of(tmp_path / "back" / f"{name}.nii.gz"), values)
        elif kind in (4, 5):
            pytest.fail("a good case was refused")
    assert set(allowed_values("brats2021")) == {0, 1, 2, 4}


def test_plans_of_every_kind_we_know_pass() -> None:
    for settings in ({}, {"patch": (16, 16)}, {"residual": True}, {"modalities": 2}):
        content = builders.plans(**settings)
        (configuration,) = content["configurations"].values()
        check_plans(content, len(configuration["normalization_schemes"]))
