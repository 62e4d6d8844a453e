"""What `speed.py` measures of whole cases: models of random weights, a case, the commands compared, where time goes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from step import CLASSES, MODALITIES, REGIONS
from subsets import files

from nnunetv2_mgml.inference import predictor as prediction
from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.phantom import write_phantoms
from nnunetv2_mgml.upstream.registration import add_ext_dir

CASE = "case"
DATASET: dict[str, Any] = {
    "channel_names": {"0": "t1", "1": "t1ce", "2": "t2", "3": "flair"},
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
    "regions_class_order": [1, 2, 3],
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
PARTS = ("reading", "preprocessing", "network", "sliding window", "resampling", "export", "everything else")
_SPARSE = -3.0
"""Added to the bias of the last layer: label maps of random weights are then nearly empty, as those of real cases."""


def write_plans(plan: ConfigurationManager, spacing: float = 1.0) -> dict[str, Any]:
    """Return whole plans around nnU-Net's configuration of `step.make_plan`, for cubic voxels of ``spacing`` mm."""
    resampling = {f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in ("data", "seg", "probabilities")}
    orders = {
        f"resampling_fn_{kind}_kwargs": {
            "is_seg": kind == "seg",
            "order": order,
            "order_z": 0,
            "force_separate_z": None,
        }
        for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1))
    }
    configuration = {
        **plan.configuration,
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 1,
        "spacing": [spacing] * 3,
        "median_image_size_in_voxels": [140.0, 175.0, 140.0],
        "use_mask_for_norm": [True] * MODALITIES,
        **resampling,
        **orders,
    }
    zeros = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 0.0)
    return {
        "dataset_name": "Dataset999_Speed",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": [155, 240, 240],
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {str(c): dict(zeros) for c in range(MODALITIES)},
    }


def write_model(folder: Path, trainer: str, plans: dict[str, Any], options: dict[str, Any]) -> Path:
    """Write a model folder of random weights, as training leaves it.

    Args:
        folder: it must not exist.
        trainer: `nnUNetTrainerMGML`, or nnU-Net's own `nnUNetTrainer`.
        plans: from `write_plans`.
        options: of the plugin.
    """
    add_ext_dir()
    plans = {**plans, "mgml": {"config": options, "num_classes": CLASSES}}
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    torch.manual_seed(0)
    network = recursive_find_trainer_class_by_name(trainer).build_network_architecture(
        manager, configuration, MODALITIES, REGIONS, False
    )
    with torch.no_grad():
        network.decoder.seg_layers[-1].bias += _SPARSE
    (folder / "fold_0").mkdir(parents=True)
    write_json(folder / "dataset.json", DATASET)
    write_json(folder / "plans.json", plans)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer,
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def write_case(folder: Path, source: Path | None, shape: tuple[int, int, int]) -> str:
    """Write ``images/case_XXXX.nii.gz`` and ``labels/case.nii.gz``; return what case it is.

    Args:
        folder: where.
        source: folder of a BraTS 2021 case; None: a phantom.
        shape: voxels of the phantom, z, y, x.
    """
    if source is None:
        (source,) = write_phantoms(folder / "phantom", 1, 0, shape, (1.0, 1.0, 1.0))
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for channel, name in DATASET["channel_names"].items():
        (volume,) = source.glob(f"*_{name}.nii.gz")
        os.symlink(volume.resolve(), folder / "images" / f"{CASE}_{int(channel):04d}.nii.gz")
    (segmentation,) = source.glob("*_seg.nii.gz")
    labels = sitk.ReadImage(str(segmentation))
    values = sitk.GetArrayFromImage(labels)
    values = np.where(values == 4, 3, values).astype(np.uint8)
    written = sitk.GetImageFromArray(values)
    written.CopyInformation(labels)
    sitk.WriteImage(written, str(folder / "labels" / f"{CASE}.nii.gz"))
    return f"{source.name}, {' x '.join(map(str, labels.GetSize()))} voxels"


def write_preprocessed(folder: Path, plans: dict[str, Any], cases: int, edge: int) -> Path:
    """Write a preprocessed dataset of noise with a ball of each label, for the loaders; ``edge`` in voxels."""
    configuration = plans["configurations"]["3d_fullres"]
    target = folder / plans["dataset_name"]
    (target / configuration["data_identifier"]).mkdir(parents=True)
    shape = (edge,) * 3
    distance = np.sqrt(sum((axis - edge / 2) ** 2 for axis in np.indices(shape)))
    labels = sum((distance < edge / divisor).astype(np.int16) for divisor in (3, 4, 6))
    regions = {tuple(value): np.argwhere(np.isin(labels[None], value)) for value in ((1, 2, 3), (2, 3), (3,))}
    for case in range(cases):
        data = np.random.default_rng(case).normal(size=(MODALITIES, *shape)).astype(np.float32)
        properties = {"class_locations": regions, "spacing": [1.0] * 3}
        blocks = [min(32, edge)] * 3
        nnUNetDatasetBlosc2.save_case(
            data,
            labels[None],
            properties,
            str(target / configuration["data_identifier"] / f"case_{case}"),
            chunks=(1, *shape),
            blocks=(1, *blocks),
        )
    write_json(target / "dataset.json", DATASET)
    write_json(target / f"{plans['plans_name']}.json", plans)
    return target


def commands(work: Path, model: Path, stock: Path, bfloat16: bool) -> dict[str, Callable[[], None]]:
    """Return the commands of a user that are compared, each from image files to label maps on disk.

    Args:
        work: folder with ``images`` and ``labels``; outputs go there too.
        model: ours.
        stock: nnU-Net's own.
        bfloat16: also predict with ``--cpu_bfloat16``. By OpenVINO wherever that is installed.
    """
    ours = files(work, argparse.Namespace(m=model, f="0", cpu_bfloat16=False))
    found = {"one": ours["one"], "fifteen": ours["all"], "stock": functools.partial(predict_stock, work, stock)}
    ways = {"bfloat16": (True, None), "openvino": (False, "openvino"), "openvino_bfloat16": (True, "openvino")}
    for name, (in_bfloat16, backend) in ways.items():
        if (bfloat16 or not in_bfloat16) and (backend is None or find_spec(backend) is not None):
            given = argparse.Namespace(m=model, f="0", cpu_bfloat16=in_bfloat16, backend=backend)
            found[name] = files(work, given)["one"]
    return found


def predict_stock(work: Path, model: Path) -> None:
    """Predict as ``nnUNetv2_predict --disable_tta -npp 0 -nps 0`` does: nnU-Net's own predictor in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
        predictor.predict_from_files_sequential(str(work / "images"), tempfile.mkdtemp(dir=work))


class Stopwatch:
    """Seconds of parts of a program, each without the parts called inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for a part."""
        self._book()
        self._running.append(name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def watching(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Count the calls of a function or method for a part."""
        own = getattr(owner, name)

        @functools.wraps(own)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return own(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, own)


_WATCHED = (
    (SimpleITKIO, "read_images", "reading"),
    (DefaultPreprocessor, "run_case_npy", "preprocessing"),
    (default_resampling, "resample_data_or_seg_to_shape", "resampling"),
    (MultiEncoderUNet, "forward", "network"),
    (MultiEncoderUNet, "encode", "network"),
    (MultiEncoderUNet, "decode_subsets", "network"),
    (nnUNetPredictor, "predict_sliding_window_return_logits", "sliding window"),
    (prediction, "export_case", "export"),
    (prediction, "export_and_sum_up", "export"),
)


def profile(command: Callable[[], None]) -> dict[str, float]:
    """Return the seconds a command of ours spends per part of `PARTS`; they add up to the whole."""
    watch = Stopwatch()
    with contextlib.ExitStack() as stack:
        for owner, name, part in _WATCHED:
            stack.enter_context(watch.watching(owner, name, part))
        with watch.part("everything else"):
            command()
    return watch.seconds
