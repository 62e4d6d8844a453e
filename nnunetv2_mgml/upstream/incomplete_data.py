"""nnU-Net's fingerprint and preprocessing of data sets in which modalities are missing.

Bends: ``extract_fingerprint_dataset``, ``plan_experiment_dataset``, ``preprocess_dataset`` and
    ``verify_dataset_integrity`` in ``nnunetv2.experiment_planning.plan_and_preprocess_api``, and, while they run on
    such a data set, the planner's ``determine_reader_writer`` and the name ``DefaultPreprocessor`` in
    ``nnunetv2.preprocessing.preprocessors.default_preprocessor``. Repeats ``DatasetFingerprintExtractor.run`` and
    overrides ``DefaultPreprocessor.run_case`` and ``run``.
Why: they want a file for every channel, and take a placeholder for data: in the fingerprint, hence in CTNormalization.
    Both look for classes in nnU-Net's own folders only, so a class of ours cannot be named.
Guarded by: tests/upstream/test_incomplete_data.py, tests/upstream/test_upstream_drift.py

A data set in which no case lacks anything is left to stock code.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.io.volumes import wrong_kind
from nnunetv2_mgml.io.workers import run_jobs
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.plans.cohort import (
    FINGERPRINT,
    LEFT_OUT,
    MISSING_FILE,
    RawCase,
    channel_of,
    incomplete_cases,
    raw_cases,
    read_dataset_json,
)
from nnunetv2_mgml.plans.folders import PREPROCESSED, RAW, nnunet_folder
from nnunetv2_mgml.upstream.plain_errors import PlainError

_log = logging.getLogger(__name__)
_STOCK = default_preprocessor.DefaultPreprocessor


# --- the three steps of nnU-Net ---------------------------------------------------------------------------------------
def install(api: ModuleType) -> None:
    """Put steps that know missing modalities in front of nnU-Net's own.

    Args:
        api: ``nnunetv2.experiment_planning.plan_and_preprocess_api``; calling this twice changes nothing.
    """
    for name, wrapper in (
        ("extract_fingerprint_dataset", _fingerprint),
        ("plan_experiment_dataset", _plan),
        ("preprocess_dataset", _preprocess),
        ("verify_dataset_integrity", _verify),
    ):
        stock = getattr(api, name)
        if not hasattr(stock, "_mgml"):
            wrapped = functools.wraps(stock)(functools.partial(wrapper, stock))
            wrapped._mgml = True  # type: ignore[attr-defined]  # marks what is wrapped already
            setattr(api, name, wrapped)


def _fingerprint(
    stock: Callable[..., Any],
    dataset_id: int,
    fingerprint_extractor_class: type = DatasetFingerprintExtractor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    _refuse_other_kinds(_raw_folder(dataset_id))
    missing = _missing(_raw_folder(dataset_id))
    if missing:
        _announce(missing)
        if fingerprint_extractor_class is DatasetFingerprintExtractor:
            fingerprint_extractor_class = IncompleteFingerprintExtractor
        else:
            _log.warning("%s takes the fingerprint and must know missing files.", fingerprint_extractor_class.__name__)
    return stock(dataset_id, fingerprint_extractor_class, *args, **kwargs)


def _plan(
    stock: Callable[..., Any],
    dataset_id: int,
    experiment_planner_class: type = ExperimentPlanner,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not _missing(_raw_folder(dataset_id)):
        return stock(dataset_id, experiment_planner_class, *args, **kwargs)
    with _reader_of_a_file_there_is(experiment_planner_class):
        return stock(dataset_id, experiment_planner_class, *args, **kwargs)


def _preprocess(stock: Callable[..., None], dataset_id: int, *args: Any, **kwargs: Any) -> None:
    missing = _missing(_raw_folder(dataset_id))
    folder = nnunet_folder(PREPROCESSED) / maybe_convert_to_dataset_name(dataset_id)
    if missing:
        with _our_preprocessor():
            stock(dataset_id, *args, **kwargs)
        write_json(folder / MISSING_FILE, missing)
    else:
        stock(dataset_id, *args, **kwargs)
        (folder / MISSING_FILE).unlink(missing_ok=True)  # of an earlier preprocessing


def _verify(stock: Callable[..., None], folder: str, num_processes: int = 8) -> None:
    if _missing(Path(folder)):
        verify_incomplete(Path(folder), num_processes)
    else:
        stock(folder, num_processes)


def _missing(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return case -> what it lacks. What only we cannot read, and nobody meant for us, is left to nnU-Net."""
    try:
        return incomplete_cases(folder)
    except (ValueError, FileNotFoundError):
        if (folder / MISSING_FILE).is_file():
            raise
        return {}


def _refuse_other_kinds(folder: Path) -> None:
    """Refuse complex numbers, of which nnU-Net takes the real part without a word, and colours or vectors.

    Where one file holds all channels of a case, nnU-Net reads colours as channels.

    Raises:
        PlainError: there are such files; it names the first ones.
    """
    try:
        cases = raw_cases(folder)
    except (ValueError, FileNotFoundError):  # for nnU-Net to say
        return
    one_file = all(set(case.files) == {0} for case in cases)
    images = () if one_file else (path for case in cases for path in case.files.values())
    wrong = [text for path in (*images, *(case.label for case in cases)) if (text := wrong_kind(path))]
    if wrong:
        raise PlainError(f"{len(wrong)} file(s) of {folder} are no volumes:\n" + "\n".join(f"  {w}" for w in wrong[:5]))


def _raw_folder(dataset_id: int) -> Path:
    return nnunet_folder(RAW) / str(maybe_convert_to_dataset_name(dataset_id))


def _announce(missing: Mapping[str, Sequence[str]]) -> None:
    counts: dict[str, int] = {}
    for names in missing.values():
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    _log.warning(
        "nnunetv2_mgml: %s modalities (%s); fingerprint and normalisation leave them out.",
        "1 case lacks" if len(missing) == 1 else f"{len(missing)} cases lack",
        ", ".join(f"{name} in {count}" for name, count in counts.items()),
    )


@contextmanager
def _reader_of_a_file_there_is(planner: type) -> Iterator[None]:
    """Let a planner choose its reader by the first file that exists; it would take the first one that is listed."""
    name = "determine_reader_writer"
    own = planner.__dict__.get(name)

    def determine(self: Any) -> type:
        paths = (path for case in self.dataset.values() for path in case["images"] if os.path.isfile(path))
        found: type = determine_reader_writer_from_dataset_json(self.dataset_json, next(paths))
        return found

    setattr(planner, name, determine)
    try:
        yield
    finally:
        if own is None:
            delattr(planner, name)
        else:
            setattr(planner, name, own)


@contextmanager
def _our_preprocessor() -> Iterator[None]:
    """Let nnU-Net find `IncompletePreprocessor` under the name that is in the plans, ``DefaultPreprocessor``."""
    default_preprocessor.DefaultPreprocessor = IncompletePreprocessor
    try:
        yield
    finally:
        default_preprocessor.DefaultPreprocessor = _STOCK


# --- fingerprint ------------------------------------------------------------------------------------------------------
class _CaseJob(NamedTuple):
    case: RawCase
    reader: type
    num_samples: int


class _CaseFingerprint(NamedTuple):
    shape: tuple[int, ...]
    spacing: Any
    intensities: dict[int, NDArray[Any]]
    """Channel index -> intensities sampled in the foreground, of the channels there are."""
    relative_size: float


class IncompleteFingerprintExtractor(DatasetFingerprintExtractor):  # type: ignore[misc]  # nnunetv2 ships no types
    """nnU-Net's fingerprint from the volumes that exist.

    Crop box and intensities of a case come from the modalities it has, the intensities of a channel from the cases that
    have it. For a complete case it is what nnU-Net takes itself.
    """

    def run(self, overwrite_existing: bool = False) -> dict[str, Any]:
        """Return the fingerprint, and write it where nnU-Net looks for it.

        One that is there is taken again where it left other volumes out than are missing now: it would be of
        placeholders, or of less than there is.

        Raises:
            ValueError: a modality of which no case with foreground is left.
        """
        path = nnunet_folder(PREPROCESSED) / self.dataset_name / FINGERPRINT
        left_out = {case: list(names) for case, names in incomplete_cases(Path(self.input_folder)).items()}
        if path.is_file() and not overwrite_existing:
            content: dict[str, Any] = read_json(path)
            if content.get(LEFT_OUT, {}) == left_out:
                return content
            _log.warning(
                "nnunetv2_mgml: other modalities were missing when the fingerprint was taken; taking it again."
            )
        cases = raw_cases(Path(self.input_folder))
        reader = determine_reader_writer_from_dataset_json(self.dataset_json, str(next(iter(cases[0].files.values()))))
        samples = int(self.num_foreground_voxels_for_intensitystats // len(cases))
        found = run_jobs(
            analyze_present,
            [_CaseJob(case, reader, samples) for case in cases],
            self.num_processes,
            "Extracting dataset fingerprint",
            self.show_progress_bar,
        )
        fingerprint = {
            "spacings": [[float(s) for s in case.spacing] for case in found],
            "shapes_after_crop": [list(case.shape) for case in found],
            "foreground_intensity_properties_per_channel": {
                str(c): _statistics(name, [case.intensities[c] for case in found if c in case.intensities])
                for c, name in enumerate(channel_names(self.dataset_json))
            },
            "median_relative_size_after_cropping": float(np.median([case.relative_size for case in found])),
            **({LEFT_OUT: left_out} if left_out else {}),
        }
        write_json(path, fingerprint, indent=4)
        return fingerprint


def analyze_present(job: _CaseJob) -> _CaseFingerprint:
    """Take the fingerprint of one case from the files it has; runs in worker processes."""
    reader = job.reader()
    images, properties = reader.read_images([str(path) for path in job.case.files.values()])
    segmentation, _ = reader.read_seg(str(job.case.label))
    data, segmentation, _ = crop_to_nonzero(images, segmentation)
    intensities, _ = DatasetFingerprintExtractor.collect_foreground_intensities(
        segmentation, data, num_samples=job.num_samples
    )
    return _CaseFingerprint(
        data.shape[1:],
        properties["spacing"],
        {channel: np.asarray(values) for channel, values in zip(job.case.files, intensities, strict=True)},
        float(np.prod(data.shape[1:]) / np.prod(images.shape[1:])),
    )


def _statistics(name: str, intensities: list[NDArray[Any]]) -> dict[str, float]:
    """Return what nnU-Net keeps of the foreground intensities of a channel."""
    values = np.concatenate(intensities) if intensities else np.zeros(0)
    if not values.size:
        raise PlainError(
            f"No training case has {name} together with any foreground, so nothing can be learned from it. Leave it "
            f"out of channel_names in dataset.json, or add cases."
        )
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return {
        "mean": float(np.mean(values)),
        "median": float(median),
        "std": float(np.std(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }


# --- preprocessing ----------------------------------------------------------------------------------------------------
class IncompletePreprocessor(_STOCK):  # type: ignore[misc,valid-type]  # nnunetv2 ships no types
    """nnU-Net's preprocessing of cases of which some modalities are absent.

    Crop box and normalisation come from the modalities that exist; an absent channel is zero in what is saved, whatever
    the normalisation would have made of it.
    """

    absent_files: frozenset[str] = frozenset()
    """Files that exist and are not to be read, because their modality is recorded as missing."""

    def run(
        self, dataset_name_or_id: int | str, configuration_name: str, plans_identifier: str, num_processes: int
    ) -> None:
        """As upstream."""
        folder = nnunet_folder(RAW) / maybe_convert_to_dataset_name(dataset_name_or_id)
        listed = read_dataset_json(folder).get("dataset")
        used = {os.path.realpath(path) for case in raw_cases(folder) for path in case.files.values()}
        named = (image for entry in (listed or {}).values() for image in entry["images"])
        every = [folder / os.path.expandvars(image) for image in named] or list((folder / "imagesTr").iterdir())
        self.absent_files = frozenset(real for path in every if (real := os.path.realpath(path)) not in used)
        super().run(dataset_name_or_id, configuration_name, plans_identifier, num_processes)

    def run_case(
        self,
        image_files: list[str],
        seg_file: str | None,
        plans_manager: Any,
        configuration_manager: Any,
        dataset_json: dict[str, Any] | str,
    ) -> tuple[NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Preprocess one case; ``image_files`` may lack channels, which are told by the numbers in the names.

        Returns:
            Data ``(M, z, y, x)``, labels ``(1, z, y, x)`` and properties, as upstream does.
        """
        description = read_json(Path(dataset_json)) if isinstance(dataset_json, str) else dataset_json
        count = len(channel_names(description))
        present = {
            channel: path
            for channel, path in _by_channel(image_files, description["file_ending"], count).items()
            if os.path.exists(path) and os.path.realpath(path) not in self.absent_files
        }
        reader = plans_manager.image_reader_writer_class()
        images, properties = reader.read_images(list(present.values()))
        segmentation = None if seg_file is None else reader.read_seg(seg_file)[0]
        data = np.zeros((count, *images.shape[1:]), dtype=np.float32)
        data[list(present)] = images
        data, segmentation, properties = self.run_case_npy(
            data, segmentation, properties, plans_manager, configuration_manager, description
        )
        for channel in set(range(count)) - set(present):
            data[channel] = 0
        return data, segmentation, properties


def _by_channel(image_files: Sequence[str], file_ending: str, count: int) -> dict[int, str]:
    """Return channel index -> file: by position where there is a file for every channel, else by the file names."""
    if len(image_files) == count:
        return dict(enumerate(image_files))
    numbers = [channel_of(path, file_ending) for path in image_files]
    if None in numbers or len(set(numbers)) < len(numbers):
        raise PlainError(f"Cannot tell the channels of {', '.join(image_files)}; name them CASE_XXXX{file_ending}.")
    return {number: path for number, path in sorted(zip(numbers, image_files, strict=True)) if number is not None}


# --- checking ---------------------------------------------------------------------------------------------------------
class _CheckJob(NamedTuple):
    case: RawCase
    reader: type
    labels: tuple[int, ...]


def verify_incomplete(folder: Path, num_processes: int) -> None:
    """Check what ``--verify_dataset_integrity`` checks, for the files that exist.

    Raises:
        RuntimeError: a label map or an image is not as it should be; nnU-Net has printed what is wrong.
        FileNotFoundError: a case without label map.
        ValueError: ``numTraining`` does not fit.
    """
    description, cases = read_dataset_json(folder), raw_cases(folder)
    without = [case.name for case in cases if not case.label.is_file()]
    if without:
        raise FileNotFoundError(f"{len(without)} training cases have no label map: {', '.join(without[:5])}.")
    if description["numTraining"] != len(cases):
        raise ValueError(
            f"numTraining in {folder / 'dataset.json'} is {description['numTraining']}; found {len(cases)}."
        )
    manager = LabelManager(description["labels"], regions_class_order=description.get("regions_class_order"))
    labels = (*manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else []))
    reader = determine_reader_writer_from_dataset_json(description, str(next(iter(cases[0].files.values()))))
    jobs = [_CheckJob(case, reader, labels) for case in cases]
    good = run_jobs(_is_good, jobs, num_processes, "Checking", progress=False)
    bad = [case.name for case, is_good in zip(cases, good, strict=True) if not is_good]
    if bad:
        count = "1 case has" if len(bad) == 1 else f"{len(bad)} cases have"
        raise RuntimeError(f"{count} errors, see above: {', '.join(bad[:5])}.")


def _is_good(job: _CheckJob) -> bool:
    files, label = [str(path) for path in job.case.files.values()], str(job.case.label)
    good = verify_labels(label, job.reader, list(job.labels))
    return bool(check_cases(files, label, len(files), job.reader)) and bool(good)
