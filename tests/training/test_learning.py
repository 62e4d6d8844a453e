"""The trainer learns: an overfit on two cases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import BRATS_JSON, make_trainer, plans, write_dataset

from nnunetv2_mgml.training import nnUNetTrainerMGML


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    return 2 * float((prediction & reference).sum()) / float(prediction.sum() + reference.sum())


class WithoutAugmentation(nnUNetTrainerMGML):
    """An overfit asks whether two cases can be learned by heart; augmentation makes them many."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:
        rotation, dummy_2d, _, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return rotation, dummy_2d, self.configuration_manager.patch_size, mirror_axes

    @staticmethod
    def get_training_transforms(
        patch_size: Any,
        rotation_for_DA: Any,
        deep_supervision_scales: Any,
        *args: Any,
        use_mask_for_norm: Any = None,
        **labels: Any,
    ) -> Any:
        return nnUNetTrainerMGML.get_validation_transforms(deep_supervision_scales, **labels)


@pytest.mark.slow
def test_overfit_on_two_cases_reaches_dice_095(nnunet_folders: Path) -> None:
    plans_dict = plans(patch=(16, 16, 16))
    options = {
        "num_epochs": 4,
        "num_iterations_per_epoch": 75,
        "fusion": "region_aware",
        "optimizer": "adam",
        "initial_lr": 3e-3,
        "width_factor": 1.0,
    }
    trainer = make_trainer(
        WithoutAugmentation,
        write_dataset(nnunet_folders, plans_dict=copy.deepcopy(plans_dict), shape=(16, 16, 16)),
        options,
    )
    trainer.run_training()
    network = trainer.bare_network.eval()
    network.decoder.deep_supervision = False
    network.set_visible((True,) * 4)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder)
    for name in ("case_0", "case_1"):
        data, seg, _, _ = dataset.load_case(name)
        with torch.no_grad():
            predicted = network(torch.from_numpy(data[:])[None])[0].sigmoid().numpy() > 0.5
        scores = [
            dice(predicted[i], np.isin(seg[:][0], region))
            for i, region in enumerate(v for n, v in BRATS_JSON["labels"].items() if n != "background")
        ]
        assert min(scores) > 0.95, (name, scores)
