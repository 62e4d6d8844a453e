"""One zip with a model and all that a receiver needs, in the layout that nnU-Net installs."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnunetv2_mgml import __version__
from nnunetv2_mgml.inference.subset_quality import CARRIED_KEY, CARRIER, REPORT_NAME, stored_report
from nnunetv2_mgml.io.files import read_json, replacing
from nnunetv2_mgml.presentation.model_card import MODEL_CARD, model_card
from nnunetv2_mgml.scoring.subset_report import without_paths


@dataclass(frozen=True)
class ExportRequest:
    """What to put into the archive."""

    model_folder: Path
    """``.../DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION``."""
    output: Path
    """The zip file, or a folder that exists and takes one named after the model."""
    folds: tuple[int | str, ...] | None = None
    """None: every numbered fold that has the checkpoint."""
    checkpoint: str = "checkpoint_final.pth"
    licence: str = ""
    """Of the weights, for the model card."""
    overwrite: bool = False


@dataclass(frozen=True)
class ExportedModel:
    """What was written."""

    path: Path
    files: tuple[str, ...]
    """Names in the archive."""
    commands: tuple[str, str]
    """What a receiver types: install, predict."""
    has_report: bool
    """Whether the expected quality is in it."""


def export_model(request: ExportRequest) -> ExportedModel:
    """Write the archive; no patient, no case name and no path of this machine is in it but what checkpoints hold.

    Raises:
        FileNotFoundError: no model there, or a fold without the checkpoint.
        FileExistsError: the output is there already.
        ValueError: a folder that is not in nnU-Net's layout, or a damaged report.
    """
    from nnunetv2_mgml.inference.model_check import check_model_folder  # torch is slow to import

    folder = request.model_folder.resolve()
    wanted = None if request.folds is None else list(map(str, request.folds))
    folds = check_model_folder(folder, wanted, request.checkpoint)
    place = f"{folder.parent.name}/{folder.name}"
    if not folder.parent.name.startswith("Dataset") or folder.name.count("__") != 2:
        raise ValueError(
            f"{folder} is not .../DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION, so nnU-Net would not find it once it "
            f"is installed. Name the model folder itself."
        )
    output = _archive(request.output, place)
    if output.exists() and not request.overwrite:
        raise FileExistsError(f"{output} exists. Give another name, or --overwrite.")
    commands = commands_for_receiver(place, output.name, folds, request.checkpoint)
    texts, has_report = _texts(request, folder, folds, commands)
    files = {f"{place}/{name}": folder / name for name in _copied(folder, folds, request.checkpoint)}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(f"{place}/{name}", text)
        for name, path in files.items():
            archive.write(path, name)
    return ExportedModel(output, (*(f"{place}/{name}" for name in texts), *files), commands, has_report)


def _archive(output: Path, place: str) -> Path:
    """Return the file to write: in a folder one named after data set and model, else one of the name given."""
    if output.is_dir():
        return output / f"{place.replace('/', '__')}.zip"
    return output if output.suffix == ".zip" else output.with_name(f"{output.name}.zip")


def commands_for_receiver(
    place: str, archive: str, folds: list[int | str], checkpoint: str = "checkpoint_final.pth"
) -> tuple[str, str]:
    """Return the two commands a receiver types, once this package is installed.

    Args:
        place: ``DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION``.
        archive: name of the zip file.
        folds: those in it.
        checkpoint: its file name in each fold.
    """
    other = "" if checkpoint == "checkpoint_final.pth" else f" -chk {checkpoint}"
    return (
        f"nnUNetv2_install_pretrained_model_from_zip {archive}",
        f'nnUNetv2_predict_from_modelfolder -i IN -o OUT -m "$nnUNet_results/{place}" -f {" ".join(map(str, folds))}'
        f"{other} --missing_modalities auto",
    )


def _texts(
    request: ExportRequest, folder: Path, folds: list[int | str], commands: tuple[str, str]
) -> tuple[dict[str, str], bool]:
    """Return the files that are not copied as they are: name -> content; and whether there is a report."""
    stored = stored_report(folder)
    report = None if stored is None else without_paths(stored[1])
    plans: dict[str, Any] = read_json(folder / "plans.json")
    card = model_card(
        name=f"{folder.parent.name} {folder.name}",
        dataset_json=read_json(folder / "dataset.json"),
        plans=plans,
        configuration=folder.name.split("__")[2],
        folds=folds,
        report=report,
        versions={"nnunetv2_mgml": __version__, **{name: _version(name) for name in ("nnunetv2", "torch")}},
        licence=request.licence,
        commands=commands,
    )
    texts = {MODEL_CARD: card}
    fingerprint = read_json(folder / CARRIER) if (folder / CARRIER).is_file() else {}
    if report is not None:
        texts[REPORT_NAME] = json.dumps(report, indent=2)
        fingerprint = {**fingerprint, CARRIED_KEY: report}
    if fingerprint:
        texts[CARRIER] = json.dumps(fingerprint, indent=4)
    return texts, report is not None


def _copied(folder: Path, folds: list[int | str], checkpoint: str) -> list[str]:
    """Return what is copied as it is, by path inside the model folder."""
    optional = [
        f"fold_{fold}/{name}"
        for fold in folds
        for name in ("progress.png", "mgml_progress.png", "mgml_training_log.csv")
    ]
    optional += [
        f"{results.name}/{name}"
        for results in sorted(folder.glob("crossval_results_folds_*"))
        for name in ("postprocessing.pkl", "postprocessing.json")
    ]
    needed = ["plans.json", "dataset.json", *(f"fold_{fold}/{checkpoint}" for fold in folds)]
    return [*needed, *(name for name in optional if (folder / name).is_file())]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
