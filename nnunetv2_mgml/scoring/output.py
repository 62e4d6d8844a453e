"""The folder of an evaluation: begun, resumed, scored again, or started again, without deleting what is not ours."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.io.targets import is_same

SCORING_ONLY = ("scoring.metrics", "scoring.min_region_voxels", "scoring.policy")
"""Settings that do not change a prediction; their parts (``scoring.min_region_voxels.WT``) belong to them."""

PREVIOUS_STAGE = "previous_stage"
"""Folder of what the first stage of a cascade predicted; it lasts as long as the predictions do."""

_RESULTS = (
    "results.csv",
    "summary.json",
    "table.md",
    "table.tex",
    *(f"figures/{name}.png" for name in ("heatmap", "number_of_modalities", "shapley")),
)
PAGE = "report.html"
"""What ``mgml report`` makes of an evaluation, unless it is told another place."""
_FOOTER = "<footer><p>Written by nnunetv2_mgml "
"""In the page of every version."""
_SETTINGS = "settings.json"
_OURS = ("results.csv", "summary.json")
_FOREIGN = (*_OURS, "plans.json", "imagesTr", "imagesTs")
"""Where no evaluation is there: of a data set, a model, or of nnU-Net's predictions and their summary."""
_log = logging.getLogger(__name__)


def holds_evaluation(folder: Path) -> bool:
    """Return whether there is an evaluation in a folder, finished or begun."""
    return (folder / _SETTINGS).is_file() or (folder / "results.csv").is_file()


def is_page(path: Path) -> bool:
    """Return whether a file is a page of ``mgml report``, of this or an earlier version, by its last line."""
    return _FOOTER.encode() in path.read_bytes()


def open_output(
    folder: Path,
    fingerprint: dict[str, Any],
    overwrite: bool,
    subsets: Sequence[str] = (),
    inputs: Iterable[Path] = (),
    restart_if_changed: bool = False,
) -> None:
    """Prepare an evaluation folder: new, begun with the same settings, or started again.

    Results of an earlier run, and the page about them, are removed, so that those of a run that fails cannot be taken
    for its own; the scores behind them (``cases``) are kept where the settings are the same.

    Args:
        folder: the evaluation folder.
        fingerprint: JSON-ready settings that must not change between runs; predictions are deleted only where an
            earlier fingerprint has the key ``model``, because no other evaluation writes any.
        overwrite: delete what an earlier evaluation left (only files of ours). Where nothing but `SCORING_ONLY`
            settings differ, its predictions are kept and only scored again.
        subsets: names of the subsets this run evaluates.
        inputs: folders and files this run reads; none may be the folder, or lie in what would be deleted.
        restart_if_changed: ``overwrite`` where settings differ, resume where they do not.

    Raises:
        ValueError: the folder holds an evaluation with other settings, or of subsets that are not among these, or
            predictions of unknown origin, or is an input or another's folder, or an input lies in what would be
            deleted; the message names it.
    """
    file = folder / _SETTINGS
    inputs = list(inputs)
    _refuse_input(folder, inputs)
    stored = read_json(file) if file.is_file() else None
    finished = all((folder / name).is_file() for name in _OURS)
    foreign = [name for name in _FOREIGN if (folder / name).exists()]
    if stored is None and not finished and foreign:
        raise ValueError(
            f"{folder} holds {', '.join(foreign)}, but no evaluation ({file.name}): it is a data set, a model or "
            f"predictions, and is left as it is. Use another -o."
        )
    different: dict[str, str] = {} if stored is None else _differences(stored, fingerprint)
    if stored is None and "model" in fingerprint and any((folder / "predictions").glob("*/*")):
        raise ValueError(
            f"{folder / 'predictions'} holds files, but no evaluation ({file.name}) that says what made "
            f"them. Use another -o, or score them with --predictions."
        )
    if stored is not None and (overwrite or (restart_if_changed and different)):
        _delete_earlier(folder, stored, different, inputs)
    elif different:
        raise ValueError(
            f"{folder} holds an evaluation with other settings: {'; '.join(different.values())}. Use "
            f"another -o, or --overwrite to {_again(different)}."
        )
    else:
        _refuse_other_subsets(folder, subsets)
    for name in _RESULTS:
        (folder / name).unlink(missing_ok=True)
    if (folder / PAGE).is_file() and is_page(folder / PAGE):
        (folder / PAGE).unlink()
    if (folder / "figures").is_dir() and not any((folder / "figures").iterdir()):
        (folder / "figures").rmdir()
    write_json(file, fingerprint)


def _refuse_input(folder: Path, inputs: Iterable[Path]) -> None:
    """Raise a ValueError where an evaluation would be written among what it reads."""
    for place in sorted({path if path.is_dir() else path.parent for path in inputs}):
        if is_same(folder, place):
            raise ValueError(
                f"-o {folder} is what is evaluated ({place}); the evaluation needs a folder of its own. Use another -o."
            )


def _delete_earlier(folder: Path, stored: dict[str, Any], different: dict[str, str], inputs: Iterable[Path]) -> None:
    """Delete finished cases, and predictions unless only the scoring differs."""
    parts = [folder / "cases"]
    if "model" in stored:
        if different and _only_scoring(different):
            _log.warning(
                "Only scoring settings changed: the predictions in %s are kept and scored again. To predict "
                "again as well, delete that folder.",
                folder / "predictions",
            )
        else:
            parts += [folder / "predictions", folder / PREVIOUS_STAGE]
    for part in parts:
        inside = [path for path in inputs if path.resolve().is_relative_to(part.resolve())]
        if inside:
            raise ValueError(
                f"--overwrite would delete {part}, but this evaluation reads {inside[0]}. Use another "
                f"-o, or move these files out of it first."
            )
    for part in parts:
        if part.is_dir():
            shutil.rmtree(part)


def _refuse_other_subsets(folder: Path, subsets: Sequence[str]) -> None:
    summary = folder / "summary.json"
    before = read_json(summary).get("subsets", []) if summary.is_file() else []
    lost = [name for name in before if name not in subsets]
    if lost:
        raise ValueError(
            f"{folder} holds the results of {len(before)} subsets; this run would replace them by those "
            f"of {len(subsets)}, without {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}. Use "
            f"another -o, ask for these subsets too, or --overwrite."
        )


def _only_scoring(keys: Iterable[str]) -> bool:
    return all(any(key == name or key.startswith(f"{name}.") for name in SCORING_ONLY) for key in keys)


def _again(different: Iterable[str]) -> str:
    return "score again what is predicted" if _only_scoring(different) else "start again"


def _differences(stored: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, str]:
    """Return setting -> how it differs."""
    before, now = _flat(stored), _flat(fingerprint)
    return {
        key: f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(set(before) | set(now))
        if before.get(key) != now.get(key)
    }


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        return {prefix: list(content) if isinstance(content, tuple) else content}
    return {
        name: leaf
        for key, value in content.items()
        for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
