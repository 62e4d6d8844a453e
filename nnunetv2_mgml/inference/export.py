"""Write a prediction so that a file is either complete or not there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager


def export_case(logits: np.ndarray, properties: dict[str, Any], configuration_manager: ConfigurationManager,
                plans_manager: PlansManager, dataset_json: dict[str, Any], ofile: str,
                save_probabilities: bool) -> None:
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
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder or ".") as scratch:
        export_prediction_from_logits(logits, properties, configuration_manager, plans_manager, dataset_json,
                                      os.path.join(scratch, name), save_probabilities)
        # The segmentation last: --continue_prediction takes it as the sign that the case is done.
        for written in sorted(os.listdir(scratch), key=lambda entry: entry == segmentation):
            os.replace(os.path.join(scratch, written), os.path.join(folder, written))


def write_json(content: dict[str, Any], path: str | Path) -> None:
    """Write a JSON file under a temporary name in the same folder and move it into place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
