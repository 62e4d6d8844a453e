"""The trainer learns: an overfit on two cases."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import BRATS_JSON, make_trainer, plans, write_dataset

from nnunetv2_mgml.training import nnUNetTrainerMGML


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    return 2 * float((prediction & reference).sum()) / float(prediction.sum() + reference.sum())


@pytest.mark.slow
def test_overfit_on_two_cases_reaches_dice_095(nnunet_folders: Path) -> None:
    plans_dict = plans(patch=(24, 24, 24))
    options = {"num_epochs": 4, "num_iterations_per_epoch": 50, "fusion": "region_aware", "optimizer": "adam",
               "initial_lr": 3e-3}
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders, plans_dict=copy.deepcopy(plans_dict),
                                                            shape=(24, 24, 24)), options)
    trainer.run_training()
    network = trainer.bare_network.eval()
    network.decoder.deep_supervision = False
    network.set_availability((True,) * 4)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder)
    for name in ("case_0", "case_1"):
        data, seg, _, _ = dataset.load_case(name)
        with torch.no_grad():
            predicted = network(torch.from_numpy(data[:])[None])[0].sigmoid().numpy() > 0.5
        scores = [dice(predicted[i], np.isin(seg[:][0], region))
                  for i, region in enumerate(v for n, v in BRATS_JSON["labels"].items() if n != "background")]
        assert min(scores) > 0.95, (name, scores)
