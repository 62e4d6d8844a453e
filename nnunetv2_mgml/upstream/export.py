"""nnU-Net's export of a prediction, checked against what it was to write.

Bends: ``PlansManager.image_reader_writer_class`` of the plans handed to ``export_prediction_from_logits``, so that the
    writer it makes reads its file back.
Why: SimpleITK says nothing when the disk is full, and the export keeps the segmentation to itself.
Guarded by: tests/upstream/test_export.py, tests/upstream/test_inference_drift.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunetv2_mgml.io.files import naming, scratch
from nnunetv2_mgml.io.targets import PREVIEW, UNCERTAINTY
from nnunetv2_mgml.io.volumes import IncompleteWriteError, check_file, check_name, check_written, not_written


def export_case(
    logits: NDArray[Any],
    properties: dict[str, Any],
    configuration_manager: ConfigurationManager,
    plans_manager: PlansManager,
    dataset_json: dict[str, Any],
    ofile: str,
    save_probabilities: bool,
    look: Callable[[NDArray[Any]], None] | None = None,
) -> None:
    """Run nnU-Net's own export in a scratch folder beside the output, then move what it wrote into place.

    What was made with or from a segmentation that is replaced goes before it does: probabilities, unless new ones take
    their place, map of uncertainty and preview.

    Args:
        logits: ``(heads, z, y, x)`` on the preprocessed grid.
        properties: nnU-Net's properties of the case.
        configuration_manager: the model's configuration.
        plans_manager: the model's plans.
        dataset_json: the model's dataset.json.
        ofile: output file without ending.
        save_probabilities: also write ``.npz`` and ``.pkl``.
        look: is called with the label map ``(z, y, x)`` on the image's grid once it is written whole, before anything
            is put in place.

    Raises:
        VolumeError: the output's name is not UTF-8.
        IncompleteWriteError: the segmentation could not be written whole; nothing has been put in place.
        OSError: another file could not be written.
    """
    check_name(ofile)
    folder, name = os.path.split(ofile)
    segmentation = name + dataset_json["file_ending"]
    if folder:
        os.makedirs(folder, exist_ok=True)
    with naming(os.path.join(folder, segmentation)), scratch(folder or os.curdir) as temporary:
        try:
            export_prediction_from_logits(
                logits,
                properties,
                configuration_manager,
                _CheckedPlans(plans_manager, look),
                dataset_json,
                os.path.join(temporary, name),
                save_probabilities,
            )
        except IncompleteWriteError as error:
            raise not_written(os.path.join(folder, segmentation)) from error
        written = os.listdir(temporary)
        _remove_outdated(folder, name, dataset_json["file_ending"], written)
        # The segmentation last: --continue_prediction takes it as the sign that the case is done.
        for entry in sorted(written, key=lambda entry: entry == segmentation):
            os.replace(temporary / entry, os.path.join(folder, entry))


def _remove_outdated(folder: str, name: str, ending: str, written: Collection[str]) -> None:
    """Delete what belongs to the segmentation that is about to be replaced, but for what is replaced itself."""
    beside = [os.path.join(UNCERTAINTY, name + ending), os.path.join(PREVIEW, f"{name}.png")]
    for entry in (*beside, f"{name}.npz", f"{name}.pkl"):
        if entry not in written:
            Path(folder, entry).unlink(missing_ok=True)


class _CheckedPlans:
    """nnU-Net's plans, whose writer checks what it has written."""

    def __init__(self, plans: PlansManager, look: Callable[[NDArray[Any]], None] | None = None) -> None:
        self._plans = plans
        self._look = look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plans, name)

    def image_reader_writer_class(self) -> _CheckedWriter:
        """Return a writer, as ``image_reader_writer_class()`` of the plans does."""
        return _CheckedWriter(self._plans.image_reader_writer_class(), self._look)


class _CheckedWriter:
    def __init__(self, writer: Any, look: Callable[[NDArray[Any]], None] | None = None) -> None:
        self._writer = writer
        self._look = look

    def write_seg(self, seg: NDArray[Any], output_fname: str, properties: dict[str, Any]) -> None:
        """Write a label map ``(z, y, x)`` and read it back."""
        self._writer.write_seg(seg, output_fname, properties)
        try:
            check_file(output_fname)
            found = self._writer.read_seg(output_fname)[0]
        except Exception as error:  # every reader library has its own exceptions
            raise not_written(os.path.basename(output_fname)) from error
        check_written(os.path.basename(output_fname), seg, np.reshape(found, np.shape(seg)))
        if self._look is not None:
            self._look(seg)
