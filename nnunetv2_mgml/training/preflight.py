"""What a training is asked for, checked before nnU-Net builds anything or makes a folder."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.inference.arguments import check_device
from nnunetv2_mgml.plans.folders import RESULTS, nnunet_folder
from nnunetv2_mgml.plans.planned import PREPARE, planned_folder, read_planned
from nnunetv2_mgml.plans.splits import trains_on_test_cases
from nnunetv2_mgml.training import TRAINERS

_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """The arguments of ``nnUNetv2_train`` that can be wrong."""

    dataset: str
    """Id or name."""
    configuration: str
    fold: str
    """A number, or ``all``."""
    trainer: str
    plans: str = "nnUNetPlans"
    device: str = "cuda"
    num_gpus: int = 1
    pretrained_weights: Path | None = None
    resume: bool = False
    """``--c``"""
    only_validate: bool = False
    """``--val``"""
    validate_best: bool = False
    """``--val_best``"""
    no_checkpoints: bool = False
    """``--disable_checkpointing``"""


def check_training(request: TrainingRequest) -> None:
    """Raise where a training could not begin, or should not.

    Raises:
        FileNotFoundError: no such data set, plans, preprocessed data, weights, or training to validate.
        ValueError: an unknown configuration, trainer, fold or device, options that contradict each other, or a fold
            that one of our trainers refuses; the message names what is allowed.
    """
    _check_options(request)
    _check_device(request)
    folder = planned_folder(request.dataset)
    results = nnunet_folder(RESULTS) / folder.name
    plans = read_planned(folder / f"{request.plans}.json")
    read_planned(folder / "dataset.json")
    if request.configuration not in plans.get("configurations", {}):
        allowed = ", ".join(plans.get("configurations", {})) or "none"
        raise ValueError(f"{request.plans} has no configuration {request.configuration}. Allowed: {allowed}.")
    batch_size = PlansManager(plans).get_configuration(request.configuration).batch_size
    if request.num_gpus > batch_size:
        raise ValueError(
            f"-num_gpus {request.num_gpus} needs a batch of at least as many samples, and {request.configuration} of "
            f"{request.plans} has batch_size {batch_size}. Take fewer GPUs, or mgml plan -d "
            f"{request.dataset} -p {request.plans} --set batch_size={request.num_gpus} and the plans that it writes."
        )
    trainer = find_trainer(request.trainer)
    data = folder / PlansManager(plans).get_configuration(request.configuration).data_identifier
    if not data.is_dir() or not any(data.iterdir()):
        raise FileNotFoundError(
            f"{data} has no preprocessed data of {request.configuration}. Run {PREPARE} -d {request.dataset} -c "
            f"{request.configuration} first."
        )
    if request.only_validate:
        name = f"{request.trainer}__{plans.get('plans_name', request.plans)}__{request.configuration}"
        _check_trained(results / name / f"fold_{request.fold}")
    elif getattr(trainer, "supports_missing_modalities", False):
        cases = infer_dataset_class(str(data)).get_identifiers(str(data))
        if refusal := trains_on_test_cases(folder, request.fold, cases):
            raise ValueError(refusal)


def find_trainer(name: str) -> type[Any]:
    """Return a trainer class by its name, from wherever nnU-Net finds it.

    Raises:
        ValueError: there is none; the message names ours.
    """
    try:
        with redirect_stdout(io.StringIO()):  # it says where it looks, and will do so again
            trainer: type[Any] = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise ValueError(
            f"There is no trainer {name}. Of this package: {', '.join(sorted(TRAINERS))}; and nnU-Net's own, and those "
            f"in the folders of nnUNet_extTrainer."
        ) from error
    return trainer


def _check_options(request: TrainingRequest) -> None:
    if request.fold != "all" and not request.fold.isdecimal():
        raise ValueError(f"The fold must be a number (0, 1, 2, ...) or 'all', got {request.fold}.")
    if request.resume and request.only_validate:
        raise ValueError("--c goes on training and --val only validates. Leave one of the two out.")
    if request.validate_best and request.no_checkpoints:
        raise ValueError("--val_best needs the checkpoint that --disable_checkpointing does not write. Leave one out.")
    weights = request.pretrained_weights
    if weights is None:
        return
    if request.resume:
        raise ValueError("--c goes on from a checkpoint, -pretrained_weights starts anew. Leave one of the two out.")
    if not weights.is_file():
        raise FileNotFoundError(f"-pretrained_weights {weights} does not exist.")


def _check_trained(fold: Path) -> None:
    if not (fold / "checkpoint_final.pth").is_file():
        raise FileNotFoundError(f"--val validates a finished training, and {fold} has no checkpoint_final.pth.")


def _check_device(request: TrainingRequest) -> None:
    if request.device not in _DEVICES:
        raise ValueError(f"-device must be one of {', '.join(_DEVICES)}, got {request.device}.")
    check_device(request.device)
    available = torch.cuda.device_count() if request.device == "cuda" else 1
    if not 1 <= request.num_gpus <= available:
        raise ValueError(
            f"-num_gpus must be 1 to {available} with -device {request.device} on this machine, got {request.num_gpus}."
        )
