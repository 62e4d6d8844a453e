"""Where the files are: what is to be scored, and what a finished evaluation was made from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.io.label_mark import refuse_marked
from nnunetv2_mgml.io.names import some
from nnunetv2_mgml.io.prediction_reports import REPORT_NAME, read_entries
from nnunetv2_mgml.modalities import Subset, canonical_name, parse_subset, subset_name, table_order
from nnunetv2_mgml.plans.regions import check_scored_regions
from nnunetv2_mgml.scoring.cases import CaseTask
from nnunetv2_mgml.scoring.results import Evaluation

_log = logging.getLogger(__name__)
PREDICTIONS, LABELS = "Prediction folder", "Label folder"
"""What messages call them."""

PredictionFolders = Path | Mapping[str, Path]
"""One root whose folders are named by subset, or subset (in any spelling) -> folder."""


@dataclass(frozen=True)
class FoundCases:
    """Cases to score, and what was left out."""

    tasks: list[CaseTask]
    missing: list[str]
    """Cases with a reference but not a prediction in every folder (only with ``allow_missing``)."""


def need_folder(folder: Path, what: str) -> Path:
    """Return a folder; raise a FileNotFoundError that calls it ``what`` where there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{what} {folder} does not exist.")
    return folder


def find_dataset_json(candidates: Iterable[Path], given: Path | None = None) -> Path:
    """Return the first ``dataset.json`` among files and folders.

    Args:
        candidates: where to look.
        given: the file of ``--dataset_json``, or its folder; then nothing else is looked at.

    Raises:
        FileNotFoundError: none of them has one, or what was given does not exist.
    """
    if given is not None:
        file = given / "dataset.json" if given.is_dir() else given
        if not file.is_file():
            raise FileNotFoundError(f"--dataset_json {given}: the file {file} does not exist.")
        return file
    tried: list[Path] = []
    for candidate in candidates:
        file = candidate / "dataset.json" if candidate.is_dir() else candidate
        if file.name == "dataset.json" or candidate.is_file():
            if file.is_file():
                return file
            tried.append(file)
    raise FileNotFoundError(
        f"No dataset.json found (tried {some(tried) or 'nothing'}). Name it with "
        f"--dataset_json FILE; labels, channel names and file ending are read from it."
    )


def parse_subset_option(text: str, channels: Sequence[str]) -> Subset:
    """Parse ``t1+flair``, ``all`` or ``full``. Raises ValueError for unknown names."""
    return (True,) * len(channels) if text.strip().lower() == "full" else parse_subset(text, channels)


def choose_subsets(texts: Sequence[str] | None, channels: Sequence[str]) -> list[str]:
    """Return the names of the wanted subsets in table order; all of them when none is asked for."""
    order = table_order(channels)
    if not texts:
        return [subset_name(s, channels) for s in order]
    wanted = {parse_subset_option(text, channels) for text in texts}
    return [subset_name(s, channels) for s in order if s in wanted]


def prediction_folders(given: PredictionFolders, channels: Sequence[str]) -> dict[str, Path]:
    """Return subset name -> folder, in table order.

    Args:
        given: a root whose folders are named by subset, or subset -> folder.
        channels: modality names in channel order.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: an unknown modality, a subset given twice, or a root without any subset folder.
    """
    if isinstance(given, Path):
        found = _folders_of_root(given, channels)
    else:
        found = [(parse_subset_option(text, channels), Path(folder)) for text, folder in given.items()]
    folders: dict[Subset, Path] = {}
    for subset, folder in found:
        refuse_marked(need_folder(folder, PREDICTIONS), "scoring by dataset.json")
        if subset in folders:
            raise ValueError(f"Subset {subset_name(subset, channels)} is given twice: {folders[subset]} and {folder}.")
        folders[subset] = folder
    return {subset_name(s, channels): folders[s] for s in table_order(channels) if s in folders}


def _folders_of_root(root: Path, channels: Sequence[str]) -> list[tuple[Subset, Path]]:
    found, others = [], []
    for folder in sorted(p for p in need_folder(root, PREDICTIONS).iterdir() if p.is_dir()):
        try:
            found.append((parse_subset_option(folder.name, channels), folder))
        except ValueError:
            others.append(folder.name)
    if not found:
        raise ValueError(
            f"{root} has no folder named by a modality subset (such as {'+'.join(channels[:2])} or all). "
            f"It has: {', '.join(others) or 'no folders'}. For one folder write SUBSET=FOLDER."
        )
    if others:
        _log.warning("Ignored in %s, not named by a modality subset: %s.", root, ", ".join(others))
    return found


def find_references(labels: Path, file_ending: str) -> dict[str, Path]:
    """Return case -> reference file of a folder of label maps.

    Raises:
        FileNotFoundError: no such folder, or no file with this ending in it.
    """
    refuse_marked(need_folder(labels, LABELS), "scoring by dataset.json")
    found = {
        path.name[: -len(file_ending)]: path
        for path in sorted(labels.iterdir())
        if path.name.endswith(file_ending) and not path.name.startswith(".")
    }
    if not found:
        raise FileNotFoundError(f"{labels} has no label map with the ending {file_ending} (from dataset.json).")
    return found


def pair_cases(
    references: dict[str, Path], folders: dict[str, Path], file_ending: str, allow_missing: bool = False
) -> FoundCases:
    """Pair every reference with one prediction per subset.

    A prediction that ``mgml_prediction.json`` beside it calls failed or pending is missing: its file is of an earlier
    run.

    Args:
        references: case -> file.
        folders: subset name -> folder of ``<case><file_ending>``.
        file_ending: from dataset.json.
        allow_missing: score the cases that every folder has, of its subset, instead of refusing.

    Raises:
        FileNotFoundError: predictions are missing (all are counted, the first are named), or no case is complete.
        ValueError: by ``mgml_prediction.json`` predictions are of another subset than their folder.
    """
    tasks, absent = [], {}
    others: dict[str, list[str]] = {}
    told = {name: read_entries(folder) for name, folder in folders.items()}
    for case, reference in references.items():
        predictions = {name: folder / f"{case}{file_ending}" for name, folder in folders.items()}
        entries = {name: told[name].get(case, {}) for name in folders}
        lacking = [text for name, path in predictions.items() if (text := _missing(path, entries[name]))]
        other = [text for name, path in predictions.items() if (text := _of_other_subset(path, name, entries[name]))]
        if lacking:
            absent[case] = lacking
        elif other:
            others[case] = other
        else:
            tasks.append(CaseTask(case, reference, predictions))
    if absent and not allow_missing:
        files = [file for lacking in absent.values() for file in lacking]
        raise FileNotFoundError(
            f"{len(files)} predictions are missing for {len(absent)} of {len(references)} labelled "
            f"cases: {some(files)}. Predict them, or score only complete cases with "
            f"--allow_missing."
        )
    if others and not allow_missing:
        texts = [text for other in others.values() for text in other]
        raise ValueError(
            f"{len(texts)} predictions of {len(others)} cases are not of the subset of their folder, by its "
            f"{REPORT_NAME}: {some(texts)}. Predict them from this subset, or leave these cases out with "
            f"--allow_missing."
        )
    if not tasks:
        raise FileNotFoundError(
            f"No labelled case has a prediction in every folder. Labelled: {some(references)}; "
            f"searched: {some(folders.values())}."
        )
    for name, folder in folders.items():
        extra = sorted(p.name for p in folder.glob(f"*{file_ending}") if p.name[: -len(file_ending)] not in references)
        if extra:
            _log.warning(
                "%s (%s): %d predictions have no reference and are not scored: %s.",
                folder,
                name,
                len(extra),
                some(extra),
            )
    return FoundCases(tasks, sorted({*absent, *others}))


def _missing(path: Path, entry: Mapping[str, Any]) -> str:
    """Return what an error calls a prediction that is not there, though its file may be; empty where it is."""
    if entry.get("status") in ("failed", "pending"):
        return f"{path} ({entry['status']}, by {REPORT_NAME})"
    return "" if path.is_file() else str(path)


def _of_other_subset(path: Path, subset: str, entry: Mapping[str, Any]) -> str:
    """Return what an error says of a prediction from other modalities; empty where it is from those of its folder."""
    present = entry.get("present")
    if not isinstance(present, list) or {canonical_name(str(name)) for name in present} == set(subset.split("+")):
        return ""
    return f"{path} is from {'+'.join(map(str, present))}, not {subset}"


def file_ending(dataset_json: dict[str, Any]) -> str:
    """Return ``file_ending`` of dataset.json. Raises ValueError where it is missing."""
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str) or not ending:
        raise ValueError('dataset.json has no "file_ending"; add it, for example ".nii.gz".')
    return ending


def load_dataset_json(path: Path) -> dict[str, Any]:
    """Read dataset.json. Raises ValueError when it is not an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


@dataclass(frozen=True)
class EvaluationFiles:
    """Where the files of an evaluation's cases lie."""

    images: Path
    """Folder of ``<case>_XXXX<ending>``, ``XXXX`` the channel index; or what else an evaluation of a model takes images
    from, a folder with the names of BraTS or a sheet."""
    labels: Path
    """Folder of ``<case><ending>``."""
    predictions: dict[str, Path]
    """Subset name -> folder of ``<case><ending>``."""
    file_ending: str


def find_files(
    evaluation: Evaluation,
    folder: Path,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    predictions: PredictionFolders | None = None,
    dataset_json: Path | None = None,
) -> EvaluationFiles:
    """Find an evaluation's images, labels and predictions: as given, else where it wrote or read them.

    Args:
        evaluation: the evaluation.
        folder: its folder; what it predicted itself lies in ``predictions``.
        images: folder of images, or a sheet.
        labels: folder of reference label maps.
        predictions: label maps by subset.
        dataset_json: gives the file ending; else searched beside all of these.

    Raises:
        FileNotFoundError: a folder is not known or does not exist, or there is no dataset.json.
        ValueError: predictions are named wrongly, or of no subset of the evaluation.
    """
    source, predicted = evaluation.info.source, folder / "predictions"
    images, labels = images or source.images, labels or source.labels
    if images is None or labels is None:
        what = "images" if images is None else "label maps"
        raise FileNotFoundError(f"The evaluation '{evaluation.name}' does not say where its {what} are.")
    if predictions is None and not predicted.is_dir():
        predictions = {name: path for name, path in (source.folders or {}).items() if path.is_dir()}
        if not predictions:
            gone = ", ".join(map(str, (source.folders or {}).values()))
            raise FileNotFoundError(f"No predictions: {gone or predicted} does not exist.")
    for found in (labels, *([] if images.is_file() else [images])):
        need_folder(found, "The folder")
    folders = prediction_folders(predicted if predictions is None else predictions, evaluation.channels)
    folders = {name: path for name, path in folders.items() if name in evaluation.subset_names}
    if not folders:
        raise ValueError(f"The predictions are of none of the evaluated subsets: {', '.join(evaluation.subset_names)}.")
    candidates = [images.parent, labels, labels.parent, *folders.values(), predicted]
    if images.is_dir():
        candidates.insert(0, images)
    model = evaluation.info.model
    candidates += [model.folder] if model is not None and model.folder is not None else []
    file = find_dataset_json(candidates, dataset_json)
    content = load_dataset_json(file)
    check_scored_regions(content)
    return EvaluationFiles(images, labels, folders, file_ending(content))
