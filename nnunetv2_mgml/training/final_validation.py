"""nnU-Net's final validation, told of each case which modalities it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunetv2_mgml.dataloading.availability import case_availability
from nnunetv2_mgml.upstream.validation_cases import announced_cases

if TYPE_CHECKING:
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


@contextmanager
def announcing_cases(trainer: nnUNetTrainerMGML) -> Iterator[None]:
    """Tell the trainer's network, before nnU-Net loads a case to predict, what this case has."""

    def announce(dataset: nnUNetBaseDataset, case: str) -> None:
        trainer.learner.announce(case_availability(dataset, [case], len(trainer.channels))[case])

    with announced_cases(trainer, announce):
        try:
            yield
        finally:
            trainer.learner.announce(None)
