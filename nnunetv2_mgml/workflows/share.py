"""One zip with a model and all that a receiver needs, in the layout that nnU-Net installs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnunetv2_mgml import __version__
from nnunetv2_mgml.inference.subset_quality import CARRIED_KEY, CARRIER, REPORT_NAME, stored_report
from nnunetv2_mgml.io.files import read_json, replacing
from nnunetv2_mgml.plans.model_files import previous_stage
from nnunetv2_mgml.presentation.model_card import MODEL_CARD, model_card
from nnunetv2_mgml.scoring.subset_report import without_paths

DATASET = "dataset.json"
_LISTS = ("dataset", "training", "validation", "test")
"""What lists cases or their files in ``dataset.json``, of nnU-Net and of the Medical Segmentation Decathlon."""


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
    commands: tuple[str, ...]
    """What a receiver types: install, predict; of a cascade's second stage, predict with the first before."""
    has_report: bool
    """Whether the expected quality is in it."""
    first_stage: str | None = None
    """Of a cascade's second stage: the model that is needed, too, ``DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION``."""


def export_model(request: ExportRequest) -> ExportedModel:
    """Write the archive; no patient, no case name and no path of this machine is in it.

    Lists of cases are taken out of ``dataset.json``, and of the copy of it that nnU-Net puts into checkpoints.

    Raises:
        FileNotFoundError: no model there, or a fold without the checkpoint.
        FileExistsError: the output is there already.
        ValueError: a folder that is not in nnU-Net's layout, a damaged report, or a checkpoint that is damaged or would
            run code.
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
    stage = previous_stage(folder)
    first_stage = None if stage is None else f"{folder.parent.name}/{stage.name}"
    commands = commands_for_receiver(place, output.name, folds, request.checkpoint, first_stage)
    texts, has_report = _texts(request, folder, folds, commands, first_stage)
    files = {f"{place}/{name}": folder / name for name in _copied(folder, folds, request.checkpoint)}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(f"{place}/{name}", text)
        for name, path in files.items():
            if path.name == request.checkpoint:
                _add_checkpoint(archive, path, name, temporary.with_name(request.checkpoint))
            else:
                archive.write(path, name)
    return ExportedModel(output, (*(f"{place}/{name}" for name in texts), *files), commands, has_report, first_stage)


def _add_checkpoint(archive: zipfile.ZipFile, path: Path, name: str, temporary: Path) -> None:
    """Add a checkpoint as it is, or rewritten in a temporary place, where its ``dataset.json`` lists cases."""
    import torch  # slow to import

    from nnunetv2_mgml.upstream.checkpoints import load_checkpoint

    content = load_checkpoint(path, mmap=True, flag=False)
    arguments: dict[str, Any] = content.get("init_args") or {}
    dataset_json = arguments.get("dataset_json")
    if not isinstance(dataset_json, dict) or not dataset_json.keys() & set(_LISTS):
        archive.write(path, name)
        return
    torch.save({**content, "init_args": {**arguments, "dataset_json": _without_lists(dataset_json)}}, temporary)
    archive.write(temporary, name)
    temporary.unlink()


def _without_lists(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dataset_json.items() if key not in _LISTS}


def _archive(output: Path, place: str) -> Path:
    """Return the file to write: in a folder one named after data set and model, else one of the name given."""
    if output.is_dir():
        return output / f"{place.replace('/', '__')}.zip"
    return output if output.suffix == ".zip" else output.with_name(f"{output.name}.zip")


def commands_for_receiver(
    place: str,
    archive: str,
    folds: list[int | str],
    checkpoint: str = "checkpoint_final.pth",
    first_stage: str | None = None,
) -> tuple[str, ...]:
    """Return the commands a receiver types, once this package is installed: to install the model, and to predict.

    Args:
        place: ``DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION``.
        archive: name of the zip file.
        folds: those in it.
        checkpoint: its file name in each fold.
        first_stage: of a cascade's second stage, the model whose predictions it needs, in the same form as ``place``.
    """
    options = f"-f {' '.join(map(str, folds))}"
    options += "" if checkpoint == "checkpoint_final.pth" else f" -chk {checkpoint}"
    steps = [("OUT", place, options)]
    if first_stage is not None:
        lower = f"OUT_{first_stage.rpartition('__')[2]}"
        steps = [(lower, first_stage, options), ("OUT", place, f"{options} -prev_stage_predictions {lower}")]
    return (
        f"nnUNetv2_install_pretrained_model_from_zip {archive}",
        *(
            f'nnUNetv2_predict_from_modelfolder -i IN -o {out} -m "$nnUNet_results/{model}" {chosen} '
            f"--missing_modalities auto"
            for out, model, chosen in steps
        ),
    )


def _texts(
    request: ExportRequest, folder: Path, folds: list[int | str], commands: tuple[str, ...], first_stage: str | None
) -> tuple[dict[str, str], bool]:
    """Return the files that are not copied as they are: name -> content; and whether there is a report."""
    stored = stored_report(folder)
    report = None if stored is None else without_paths(stored[1])
    plans: dict[str, Any] = read_json(folder / "plans.json")
    dataset_json = _without_lists(read_json(folder / DATASET))
    card = model_card(
        name=f"{folder.parent.name} {folder.name}",
        dataset_json=dataset_json,
        plans=plans,
        configuration=folder.name.split("__")[2],
        folds=folds,
        report=report,
        versions={"nnunetv2_mgml": __version__, **{name: _version(name) for name in ("nnunetv2", "torch")}},
        licence=request.licence,
        commands=commands,
        first_stage=first_stage,
    )
    texts = {MODEL_CARD: card, DATASET: json.dumps(dataset_json, indent=4)}
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
    needed = ["plans.json", *(f"fold_{fold}/{checkpoint}" for fold in folds)]
    return [*needed, *(name for name in optional if (folder / name).is_file())]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
