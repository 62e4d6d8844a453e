"""Write a prediction so that a file is either complete or not there."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_mgml.io.files import scratch


def export_case(
    logits: np.ndarray,
    properties: dict[str, Any],
    configuration_manager: ConfigurationManager,
    plans_manager: PlansManager,
    dataset_json: dict[str, Any],
    ofile: str,
    save_probabilities: bool,
) -> None:
    """Run nnU-Net's own export in a scratch folder beside the output, then move what it wrote into place.

    Args:
        logits: ``(heads, z, y, x)`` on the preprocessed grid.
        properties: nnU-Net's properties of the case.
        configuration_manager: the model's configuration.
        plans_manager: the model's plans.
        dataset_json: the model's dataset.json.
        ofile: output file without ending.
        save_probabilities: also write ``.npz`` and ``.pkl``.
    """
    folder, name = os.path.split(ofile)
    segmentation = name + dataset_json["file_ending"]
    if folder:
        os.makedirs(folder, exist_ok=True)
    with scratch(folder or os.curdir) as temporary:
        export_prediction_from_logits(
            logits,
            properties,
            configuration_manager,
            plans_manager,
            dataset_json,
            os.path.join(temporary, name),
            save_probabilities,
        )
        # The segmentation last: --continue_prediction takes it as the sign that the case is done.
        for written in sorted(os.listdir(temporary), key=lambda entry: entry == segmentation):
            os.replace(os.path.join(temporary, written), os.path.join(folder, written))
