"""What must hold of a trained model before it is used, checked with messages that name the fix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import nn

from nnunetv2_mgml._moved import forward
from nnunetv2_mgml.network.interface import subset_network
from nnunetv2_mgml.upstream.checkpoints import load_checkpoint

SUPPORTING_TRAINERS = "nnUNetTrainerMGML (and its variants), nnUNetTrainerModalityDropout"
"""Named in messages; what counts is the trainer's attribute ``supports_missing_modalities``."""

_MODELS_SHOWN = 5


def check_model_folder(
    folder: str | Path, use_folds: Sequence[int | str] | int | str | None, checkpoint_name: str
) -> list[int | str]:
    """Return the folds to use.

    Args:
        folder: ``.../TRAINER__PLANS__CONFIGURATION``.
        use_folds: as for nnU-Net; None: every numbered fold that has the checkpoint.
        checkpoint_name: for example ``"checkpoint_final.pth"``.

    Raises:
        FileNotFoundError: no trained model there, or a fold without this checkpoint.
    """
    folder = Path(folder)
    for name in ("dataset.json", "plans.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"No trained model in {folder}: {name} is missing. Check -d, -tr, -p and -c (or "
                f"-m), or train the model first.{_models_beside(folder)}"
            )
    trained = {path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint_name}")}
    if use_folds is None:
        wanted = sorted(fold for fold in trained if fold != "all")
    else:
        wanted = [str(f) for f in ([use_folds] if isinstance(use_folds, (int, str)) else use_folds)]
    lacking = [fold for fold in wanted if fold not in trained]
    if lacking or not wanted:
        others = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("fold_*/*.pth"))
        what = f"fold {', '.join(lacking)}" if lacking else "any numbered fold"
        raise FileNotFoundError(
            f"{folder} has no {checkpoint_name} for {what}. Found: "
            f"{', '.join(others) or 'nothing'}. Choose folds with -f and the file with -chk."
        )
    return [fold if fold == "all" else int(fold) for fold in wanted]


def _models_beside(folder: Path) -> str:
    """Name the models of the same data set, as the options that choose them."""
    beside = sorted(path.parent.name.split("__") for path in folder.parent.glob("*__*__*/dataset.json"))
    named = [f"-tr {names[0]} -p {names[1]} -c {names[2]}" for names in beside if len(names) == 3]
    more = f" and {len(named) - _MODELS_SHOWN} more" if len(named) > _MODELS_SHOWN else ""
    return f" Trained there: {'; '.join(named[:_MODELS_SHOWN])}{more}." if named else ""


def check_checkpoint(file: Path, trust: bool) -> None:
    """Raise unless a file is a whole checkpoint of nnU-Net or ours; weights stay on the disk.

    Raises:
        ValueError: it is damaged, of another program, or would run code (see `upstream.checkpoints.loading`).
    """
    content = load_checkpoint(file, trust, mmap=True)
    init_args, weights = content.get("init_args"), content.get("network_weights")
    axes = content.get("inference_allowed_mirroring_axes")
    for entry, holds in (
        ("trainer_name", isinstance(content.get("trainer_name"), str)),
        ("init_args.configuration", isinstance(init_args, dict) and isinstance(init_args.get("configuration"), str)),
        ("network_weights", isinstance(weights, dict) and all(isinstance(w, torch.Tensor) for w in weights.values())),
        (
            "inference_allowed_mirroring_axes",
            axes is None or (isinstance(axes, (list, tuple)) and all(axis in (0, 1, 2) for axis in axes)),
        ),
    ):
        if not holds:
            raise ValueError(f"{file} is no checkpoint of nnU-Net: '{entry}' is missing or of another kind.")


@contextmanager
def building(folder: str | Path) -> Iterator[None]:
    """Turn what nnU-Net raises while it builds a model into one line that names the folder.

    Raises:
        ValueError: plans, dataset.json and checkpoint do not fit together.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, AssertionError, RuntimeError, ImportError) as error:
        reason = "; ".join(str(error).split("\n")[:2]) or "no reason given"
        raise ValueError(
            f"The model in {folder} cannot be built ({type(error).__name__}: {reason[:300]}). Its plans.json, "
            f"dataset.json and checkpoint do not fit together, or are of another version."
        ) from error


def check_supported(network: nn.Module, trainer_name: str) -> None:
    """Raise unless the model was trained to do without some of its modalities.

    Raises:
        ValueError: it was not; the message says how to train one.
    """
    if subset_network(network) is not None:
        return
    trainer = recursive_find_trainer_class_by_name(trainer_name)
    if not getattr(trainer, "supports_missing_modalities", False):
        raise ValueError(
            f"This model was trained with {trainer_name}, which has never seen a case with a missing "
            f"modality. Trainers that have: {SUPPORTING_TRAINERS}. Train one with `nnUNetv2_train DATASET "
            f"CONFIGURATION FOLD -tr nnUNetTrainerMGML`, or predict complete cases without "
            f"--missing_modalities."
        )


if not TYPE_CHECKING:
    __getattr__ = forward(__name__)
