"""nnU-Net's final validation, told of each case which modalities it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunetv2_mgml.dataloading.availability import case_availability

if TYPE_CHECKING:
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


@contextmanager
def announcing_cases(trainer: nnUNetTrainerMGML) -> Iterator[None]:
    """Tell the trainer's network, before nnU-Net loads a case to predict, what this case has."""

    def announce(dataset: nnUNetBaseDataset, case: str) -> None:
        trainer.learner.announce(case_availability(dataset, [case], len(trainer.channels))[case])

    stock_class = trainer.dataset_class
    trainer.dataset_class = announcing(stock_class, announce)
    try:
        yield
    finally:
        trainer.dataset_class = stock_class
        trainer.learner.announce(None)


def announcing(
    dataset_class: type[nnUNetBaseDataset], announce: Callable[[nnUNetBaseDataset, str], None]
) -> type[nnUNetBaseDataset]:
    """Return a dataset class that calls ``announce(dataset, case)`` before it loads a case."""

    class Announcing(dataset_class):  # type: ignore[misc]  # nnunetv2 ships no types
        def load_case(self, identifier: str) -> Any:
            stock = dataset_class(self.source_folder, [identifier], self.folder_with_segs_from_previous_stage)
            announce(stock, identifier)
            return super().load_case(identifier)

    return Announcing
