"""A model folder kept from version 0.1.0 (`fixtures/make_model.py` made it): where it is, and what is asked of it.

The script and the test ask the same questions through these functions, the script once, the test in every version.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.training import nnUNetTrainerMGML

FIXTURE = Path(__file__).parent / "fixtures" / "model_0_1_0"
CHANNELS = ("t1", "t1ce", "t2", "flair")
SUBSETS = [
    "+".join(names) for count in range(1, 5) for names in itertools.combinations(CHANNELS, count)
]  # spelled out here: the names lie in files that users have
FLOAT_SUBSETS = ("t1+t1ce+t2+flair", "t2")
"""Those of which probabilities and mirrored predictions are kept."""
MODEL = "nnUNetTrainerMGML__nnUNetMGMLPlans__3d_fullres"
DATASET = "Dataset910_Kept"
PLANS = "nnUNetMGMLPlans"
CHECKPOINT = Path("fold_0") / "checkpoint_final.pth"


def load_predictor(model: Path, *, mirroring: bool = False) -> MGMLPredictor:
    """The model on the CPU; what is missing goes by the files that exist."""
    predictor = MGMLPredictor(
        missing_modalities=["auto"], use_mirroring=mirroring, allow_tqdm=False, device=torch.device("cpu")
    )
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    return predictor


def files_of(images: Path, subset: str) -> dict[str, Path]:
    """Modality -> file, of the one case in ``images``, for the modalities of a subset."""
    return {name: next(images.glob(f"*_{CHANNELS.index(name):04d}.nii.gz")) for name in subset.split("+")}


def predict_folder(predictor: MGMLPredictor, images: Path, subset: str, work: Path) -> np.ndarray:
    """Predict from a folder that holds only the subset's files; the label map (z, y, x) as it is read from disk."""
    (work / "images").mkdir(parents=True)
    for path in files_of(images, subset).values():
        shutil.copy(path, work / "images")
    predictor.predict_from_files_sequential(str(work / "images"), str(work / "labels"))
    [file] = (work / "labels").glob("*.nii.gz")
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def probabilities(predictor: MGMLPredictor, images: Path, subset: str) -> tuple[np.ndarray, np.ndarray]:
    """The label map (z, y, x) uint8 and the probabilities (regions, z, y, x) float32 of a subset."""
    labels, values = predictor.predict_case(files_of(images, subset), return_probabilities=True)
    return labels, np.asarray(values)


def load_trainer(model: Path, options: dict[str, Any] | None = None) -> Any:
    """A trainer made from what the checkpoint says, on the CPU. nnU-Net's folders must be set, and may be empty."""
    data = Path(os.environ["nnUNet_preprocessed"]) / DATASET / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True, exist_ok=True)
    (data / "case.b2nd").touch()  # by such a file the trainer knows how the data is stored; nothing opens it
    stored = torch.load(model / CHECKPOINT, map_location="cpu", weights_only=False)
    arguments = copy.deepcopy(stored["init_args"])
    arguments["plans"]["continue_training"] = True  # as nnUNetv2_train --c puts it there
    arguments["plans"]["mgml"]["config"].update(options or {})
    trainer = nnUNetTrainerMGML(**{**arguments, "device": torch.device("cpu")})
    trainer.initialize()
    trainer.load_checkpoint(str(model / CHECKPOINT))
    return trainer


def saved_again(trainer: Any) -> dict[str, Any]:
    """What the trainer writes into a checkpoint."""
    file = Path(trainer.output_folder) / "saved_again.pth"
    trainer.save_checkpoint(str(file))
    return torch.load(file, map_location="cpu", weights_only=False)


def training_step(model: Path, images: Path, labels: Path) -> dict[str, float]:
    """One step of the loaded checkpoint on the kept case, of which each sample sees another subset.

    No random number has a part in it: ``mask_ratio`` is 0. Returned are the step's columns of the training log, and by
    how much the step changed the network's and the MetaNetwork's weights (sum of absolute differences), with the rates
    of the last epoch.
    """
    trainer = load_trainer(model, {"mask_ratio": 0.0})
    before = _weights(torch.load(model / CHECKPOINT, map_location="cpu", weights_only=False))
    torch.manual_seed(0)
    trainer.network.train()
    output = trainer.train_step(_batch(images, labels, trainer.configuration_manager.patch_size))
    changes = {
        f"change_of_{name}": sum(float((weights[key] - before[name][key]).abs().sum()) for key in weights)
        for name, weights in _weights(saved_again(trainer)).items()
    }
    return {**{name: float(value) for name, value in output.items()}, **changes}


def _weights(checkpoint: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    return {"network": checkpoint["network_weights"], "meta_network": checkpoint["mgml"]["meta_network"]}


def _batch(images: Path, labels: Path, patch: tuple[int, ...]) -> dict[str, Any]:
    """Two patches around the tumour, the second mirrored, as nnU-Net's loader and ours put them."""
    seg = read(next(labels.glob("*.nii.gz")))
    center = np.round(np.argwhere(seg > 0).mean(axis=0)).astype(int)
    low = [int(np.clip(c - p // 2, 0, n - p)) for c, p, n in zip(center, patch, seg.shape, strict=True)]
    window = tuple(slice(a, a + p) for a, p in zip(low, patch, strict=True))
    volumes = [read(path).astype(np.float32) for path in files_of(images, SUBSETS[-1]).values()]
    data = np.stack([((v - v[v > 0].mean()) / v[v > 0].std() * (v > 0))[window] for v in volumes])
    regions = np.stack([np.isin(seg[window], region) for region in ((1, 2, 3), (2, 3), (3,))]).astype(np.float32)
    scales = [torch.from_numpy(np.stack([regions, regions[..., ::-1]])[..., ::s, ::s, ::s].copy()) for s in (1, 2)]
    visible = torch.tensor([[True, False, True, True], [False, True, False, False]])
    return {
        "data": torch.from_numpy(np.stack([data, data[..., ::-1]]).copy()),
        "target": scales,
        "available": torch.ones(2, 4, dtype=torch.bool),
        "modality_mask": visible,
        "keys": ["a", "b"],
    }


def read(path: Path) -> np.ndarray:
    """A volume (z, y, x)."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def read_expected() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The kept predictions by subset name, ``mirrored/SUBSET`` and ``probabilities/SUBSET``; and what is in JSON."""
    with np.load(FIXTURE / "expected.npz") as arrays:
        return dict(arrays), json.loads((FIXTURE / "expected.json").read_text())
