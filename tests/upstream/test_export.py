"""nnU-Net's export with a writer that reads back what it has written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference_cases import write_model
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.io.volumes import IncompleteWriteError
from nnunetv2_mgml.upstream.export import _CheckedPlans, _CheckedWriter, export_case

SHAPE = (20, 18, 22)
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
PROPERTIES: dict[str, Any] = {
    "spacing": [4.0, 3.0, 2.0],
    "sitk_stuff": {"spacing": (2.0, 3.0, 4.0), "origin": (0, 0, 0), "direction": tuple(np.eye(3).ravel())},
    "nibabel_stuff": {"original_affine": AFFINE, "reoriented_affine": AFFINE},
}


@pytest.mark.parametrize(
    ("writer", "ending", "shape"),
    [
        (SimpleITKIO, ".nii.gz", SHAPE),
        (SimpleITKIO, ".mha", SHAPE),
        (NibabelIO, ".nii.gz", SHAPE),
        (NibabelIOWithReorient, ".nii.gz", SHAPE),
        (Tiff3DIO, ".tif", SHAPE),
        (NaturalImage2DIO, ".png", (1, 18, 22)),
    ],
)
def test_every_writer_of_nnunet_passes_its_own_check(
    tmp_path: Path, writer: type[BaseReaderWriter], ending: str, shape: tuple[int, ...]
) -> None:
    labels = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    path = str(tmp_path / f"case{ending}")
    _CheckedWriter(writer()).write_seg(labels, path, PROPERTIES)
    stock = writer().read_seg(path)[0]
    np.testing.assert_array_equal(stock.reshape(shape), labels)

    class Careless(writer):  # type: ignore[misc, valid-type]
        def write_seg(self, seg: np.ndarray, output_fname: str, properties: dict[str, Any]) -> None:
            super().write_seg(seg, output_fname, properties)
            content = Path(output_fname).read_bytes()
            Path(output_fname).write_bytes(content[: len(content) // 2])

    with pytest.raises(IncompleteWriteError, match=rf"^case{ending} could not be written completely"):
        _CheckedWriter(Careless()).write_seg(labels, path, PROPERTIES)

    class Other(writer):  # type: ignore[misc, valid-type]
        def write_seg(self, seg: np.ndarray, output_fname: str, properties: dict[str, Any]) -> None:
            super().write_seg((seg + 1).astype(np.uint8), output_fname, properties)

    with pytest.raises(IncompleteWriteError):
        _CheckedWriter(Other()).write_seg(labels, path, PROPERTIES)


def test_a_full_disk_leaves_the_earlier_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    plans = PlansManager(json.loads((model / "plans.json").read_text()))
    dataset_json = json.loads((model / "dataset.json").read_text())
    configuration = plans.get_configuration("3d_fullres")
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    logits = np.random.default_rng(0).normal(size=(heads, *SHAPE)).astype(np.float16)
    properties = {
        **PROPERTIES,
        "shape_before_cropping": SHAPE,
        "shape_after_cropping_and_before_resampling": SHAPE,
        "bbox_used_for_cropping": [[0, n] for n in SHAPE],
        "spacing": configuration.spacing,
    }

    def export() -> None:
        export_case(logits, properties, configuration, plans, dataset_json, str(tmp_path / "out" / "case"), False)

    export()
    before = (tmp_path / "out" / "case.nii.gz").read_bytes()
    write = SimpleITKIO.write_seg

    def full(self: SimpleITKIO, seg: np.ndarray, output_fname: str, properties: dict[str, Any]) -> None:
        write(self, seg, output_fname, properties)
        os.truncate(output_fname, 0)

    monkeypatch.setattr(SimpleITKIO, "write_seg", full)
    with pytest.raises(IncompleteWriteError, match=r"case\.nii\.gz"):
        export()
    assert (tmp_path / "out" / "case.nii.gz").read_bytes() == before
    assert os.listdir(tmp_path / "out") == ["case.nii.gz"]
    assert _CheckedPlans(plans).plans is plans.plans
