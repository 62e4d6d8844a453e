"""Predict every subset of every case into ``<folder>/<subset>/<case><ending>``; what is there already is kept.

Beside every label map lies ``<case>.probabilities.json``, what its probabilities say of it (`inference.case_quality`).

Memory for a case with S subsets, R heads and V voxels after cropping and resampling, beside the network: ``4 M V``
bytes of input per case (of two or three at a time) and ``2 S R V`` bytes of logits (of two while one is exported). For
BraTS (S 15, R 3) that is 0.3 GB of logits per case cropped to the brain (about 140 x 175 x 140) and 0.8 GB if a
240 x 240 x 155 volume were not cropped at all.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nnunetv2_mgml.inference.case_quality import export_and_sum_up
from nnunetv2_mgml.inference.inputs import Case
from nnunetv2_mgml.inference.model_check import check_supported
from nnunetv2_mgml.inference.preprocessing import FailedItem, Job, iterate_items
from nnunetv2_mgml.inference.subsets.groups import SubsetGroups, prepare_subset_groups, preprocessed_group
from nnunetv2_mgml.inference.subsets.predictor import SubsetPredictor
from nnunetv2_mgml.io.files import file_stamp, read_json, write_json
from nnunetv2_mgml.io.volumes import not_finished
from nnunetv2_mgml.io.workers import Task, WorkerPool
from nnunetv2_mgml.modalities import Subset, parse_subset, subset_name

_log = logging.getLogger(__name__)
_ALLOW = "With --allow_missing every subset is evaluated on the cases that have its modalities."


@dataclass(frozen=True)
class FoldCases:
    """Cases and the weights that predict them."""

    folds: tuple[int | str, ...]
    """Folds whose logits are averaged; for validation cases the one that did not train on them."""
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class SubsetSettings:
    """How label maps are predicted; what else counts (mirroring, step size, device) is set on the predictor."""

    model_folder: Path
    checkpoint: str = "checkpoint_final.pth"
    shared_preprocessing: bool = False
    """Crop and normalise once from all modalities instead of exactly as prediction from a subset does."""
    allow_missing: bool = False
    """Predict a case only from the subsets whose modalities it has, instead of refusing it."""
    preprocessed: Path | None = None
    """Take the cases from this folder of nnU-Net's preprocessed data instead of from their files."""
    previous: Path | None = None
    """For a cascade's second stage: ``<subset>/<case><ending>`` that the first predicted."""
    num_processes_preprocessing: int = 1
    num_processes_export: int = 2


@dataclass(frozen=True)
class CaseLabelMaps:
    """What became of a case."""

    case: str
    files: dict[str, Path] = field(default_factory=dict)
    """Subset name -> label map, complete."""
    lacking: tuple[str, ...] = ()
    """Subsets the case cannot be predicted from, because a file is absent or a volume has one value everywhere."""
    error: Exception | None = None
    """What prevented it; it names the case."""


class SubsetLabelMaps:
    """Predicts cases of one or several folds from every subset.

    Args:
        predictor: the folds of ``work`` are loaded into it one after the other, the first ones at once.
        work: which folds predict which cases.
        subsets: subset names.
        folder: where the label maps go.
        settings: model and preprocessing.

    Raises:
        ValueError: a model that does not support missing modalities, or a cascade's second stage without the first.
    """

    def __init__(
        self,
        predictor: SubsetPredictor,
        work: Sequence[FoldCases],
        subsets: Sequence[str],
        folder: Path,
        settings: SubsetSettings,
    ) -> None:
        self.predictor = predictor
        self.work = work
        self.folder = folder
        self.settings = settings
        self._loaded: tuple[int | str, ...] | None = None
        self._todo: dict[str, list[Subset]] = {}
        self._load(work[0].folds)
        self.subsets = [parse_subset(name, predictor.channels) for name in subsets]
        self.ending: str = predictor.dataset_json["file_ending"]

    def _load(self, folds: tuple[int | str, ...]) -> None:
        if folds == self._loaded:
            return
        predictor = self.predictor
        predictor.initialize_from_trained_model_folder(
            str(self.settings.model_folder), list(folds), self.settings.checkpoint
        )
        check_supported(predictor.network, predictor.trainer_name)
        stage = predictor.configuration_manager.previous_stage_name
        if stage is not None and self.settings.previous is None:
            raise ValueError(
                f"This model is the second stage of a cascade and needs the predictions of {stage} for every subset."
            )
        self._loaded = folds

    def refuse_incomplete(self) -> None:
        """Raise a ValueError naming the cases that lack a modality some subset needs, unless that is allowed."""
        channels = self.predictor.channels
        needed = [c for c in range(len(channels)) if any(s[c] for s in self.subsets)]
        incomplete = {
            case.name: [channels[c] for c in needed if c not in case.files] for part in self.work for case in part.cases
        }
        named = [f"{case} ({', '.join(absent)})" for case, absent in incomplete.items() if absent]
        if named and not self.settings.allow_missing:
            raise ValueError(
                f"{len(named)} cases lack a modality: {', '.join(named[:10])}"
                f"{', ...' if len(named) > 10 else ''}. {_ALLOW}"
            )

    def predict(self) -> Generator[CaseLabelMaps, None, None]:
        """Yield every case once its label maps are complete, or it has failed; the next one is predicted meanwhile."""
        with WorkerPool(self.settings.num_processes_export) as exporting:
            for part in self.work:
                self._load(part.folds)
                yield from self._predict_cases(part.cases, exporting)

    def _predict_cases(self, cases: Sequence[Case], exporting: WorkerPool) -> Iterator[CaseLabelMaps]:
        jobs = []
        self._todo = {}
        for case in cases:
            drop_outdated(self.folder, case.name, self.ending, case.files)
            todo = [s for s in self.subsets if not self._is_finished(s, case)]
            if not todo:
                yield CaseLabelMaps(case.name, self._files(case.name, self.subsets))
                continue
            # What is finished is predicted along: which subsets share a batch decides how their sums round, and a run
            # that was killed is to end with the very files of one that was not.
            self._todo[case.name] = todo
            jobs.append(Job(case.name, None, self._preparation(case, self.subsets)))
        waiting: deque[tuple[CaseLabelMaps, list[Task]]] = deque()
        for item in iterate_items(jobs, self.settings.num_processes_preprocessing):
            try:
                waiting.append(self._predict_item(item, exporting))
            except Exception as error:  # out of memory, a full disk: the next case may still work
                _log.exception("Case %s failed", item.case)
                yield _failed(item.case, f"{type(error).__name__}: {error}")
            while len(waiting) > 1:
                yield _finished(*waiting.popleft(), exporting)
        while waiting:
            yield _finished(*waiting.popleft(), exporting)

    def _preparation(self, case: Case, subsets: list[Subset]) -> Callable[[], SubsetGroups]:
        settings, model = self.settings, self.predictor.model
        if settings.preprocessed is not None:
            return partial(preprocessed_group, case, subsets, settings.preprocessed, len(model.channels))
        previous = None
        if settings.previous is not None:
            folders = {s: settings.previous / subset_name(s, model.channels) for s in subsets}
            previous = {s: folder / f"{case.name}{self.ending}" for s, folder in folders.items()}
        return partial(prepare_subset_groups, case, subsets, model, settings.shared_preprocessing, previous)

    def _predict_item(self, item: SubsetGroups | FailedItem, exporting: WorkerPool) -> tuple[CaseLabelMaps, list[Task]]:
        """Predict a preprocessed case and start the exports of what is not finished."""
        case, predictor = item.case, self.predictor
        if isinstance(item, FailedItem):
            return CaseLabelMaps(case, error=ValueError(item.error)), []
        names = tuple(subset_name(s, predictor.channels) for s in item.lacking)
        if names and not self.settings.allow_missing:
            return _failed(case, f"a modality is empty, so it cannot be evaluated on {', '.join(names)}. {_ALLOW}"), []
        exports = []
        for group in item.groups:
            if not any(subset in self._todo[case] for subset in group.subsets):
                continue  # of an incomplete case, say, whose lacking subsets are never finished
            logits = predictor.predict_subsets(group.full_data(len(predictor.channels)), group.subsets)
            for subset, answer in zip(group.subsets, logits, strict=True):
                if subset not in self._todo[case]:
                    continue
                exports.append(
                    exporting.submit(
                        export_and_sum_up,
                        True,
                        answer,
                        group.properties,
                        predictor.configuration_manager,
                        predictor.plans_manager,
                        predictor.dataset_json,
                        str(self._file(subset, case))[: -len(self.ending)],
                        False,
                    )
                )
        files = self._files(case, [s for s in self.subsets if s not in item.lacking])
        return CaseLabelMaps(case, files, names), exports

    def _is_finished(self, subset: Subset, case: Case) -> bool:
        """Whether a label map is there and whole; one that is not is deleted, to be made again."""
        file = self._file(subset, case.name)
        if not file.is_file():
            return False
        wrong = not_finished(file, next(iter(case.files.values()), None))
        if wrong:
            _log.warning("%s It is predicted again.", wrong)
            file.unlink()
        return not wrong

    def _file(self, subset: Subset, case: str) -> Path:
        return self.folder / subset_name(subset, self.predictor.channels) / f"{case}{self.ending}"

    def _files(self, case: str, subsets: Sequence[Subset]) -> dict[str, Path]:
        return {subset_name(s, self.predictor.channels): self._file(s, case) for s in subsets}


def _failed(case: str, reason: str) -> CaseLabelMaps:
    return CaseLabelMaps(case, error=ValueError(f"Case {case}: {reason}"))


def _finished(maps: CaseLabelMaps, exports: Sequence[Task], exporting: WorkerPool) -> CaseLabelMaps:
    """Wait until the label maps of a case are written."""
    try:
        for export in exports:
            exporting.result(export)
    except Exception as error:  # the others are still exported
        _log.exception("Export of case %s failed", maps.case)
        return _failed(maps.case, f"export failed ({type(error).__name__}: {error})")
    return maps


def drop_outdated(folder: Path, case: str, ending: str, images: Mapping[int, str]) -> None:
    """Delete the label maps of a case unless they were made from these images; note the images beside them.

    Args:
        folder: the folder of label maps.
        case: its name.
        ending: file ending of the label maps.
        images: channel index -> path; told apart by size and time, so that a data set may be moved.
    """
    file = folder / f"{case}.inputs.json"
    now = {f"{channel:04d}": file_stamp(Path(path)) for channel, path in sorted(images.items())}
    try:
        if read_json(file) == now:
            return
    except (FileNotFoundError, ValueError):  # of an older version, or damaged: nothing tells what they were made from
        pass
    made = [path for path in folder.glob(f"*/*{ending}") if path.name == f"{case}{ending}"]
    for path in made:
        path.unlink()
    if made:
        _log.warning(
            "Case %s: its images are not (known to be) those of the predictions in %s; it is predicted again.",
            case,
            folder,
        )
    write_json(file, now)
