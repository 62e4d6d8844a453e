"""``augmentation=paper`` and ``deterministic``: what each transform does, and training with them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from builders import BRATS_JSON, configuration, make_trainer, plans, write_dataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.backends import cudnn

from nnunetv2_mgml.dataloading import paper_augmentation as paper
from nnunetv2_mgml.training import nnUNetTrainerMGML
from nnunetv2_mgml.training.variants import nnUNetTrainerModalityDropout

ANISOTROPIC = dict(
    patch=(6, 24, 24), strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]]
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def restored() -> Iterator[None]:
    """Leave no process-wide switch behind."""
    before = cudnn.deterministic, cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    cudnn.deterministic, cudnn.benchmark = before[:2]
    torch.use_deterministic_algorithms(False)
    if before[2] is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


# --- each transform ---------------------------------------------------------------------------------------------------
def rotations(shape: tuple[int, ...], draws: int = 200) -> np.ndarray:
    """Affine matrices that nnU-Net's spatial transform makes of our angles."""
    transform = SpatialTransform(shape, 0, False, p_rotation=1, rotation=paper.OneAxisRotation(paper.ROTATION))
    image = torch.zeros(1, *shape)
    return np.stack([transform.get_parameters(image=image)["affine"] for _ in range(draws)])


def test_rotation_is_in_one_plane_and_at_most_ten_degrees() -> None:
    found = rotations((8, 8, 8))
    fixed = found[:, range(3), range(3)] == 1
    assert (fixed.sum(1) == 1).all(), "one axis stays where it is"
    assert (fixed.mean(0) > 0.2).all(), "each plane is drawn"
    angles = np.rad2deg(np.arccos((np.trace(found, axis1=1, axis2=2) - 1) / 2))
    assert 9 < angles.max() <= 10
    assert angles.min() < 1
    assert np.allclose(np.linalg.det(found), 1), "no scaling"


def test_rotation_in_two_dimensions() -> None:
    found = rotations((8, 8))
    angles = np.rad2deg(np.arctan2(found[:, 1, 0], found[:, 0, 0]))
    assert -10 <= angles.min() < -9
    assert 9 < angles.max() <= 10


def test_intensity_changes_every_channel_on_its_own_within_its_range() -> None:
    transform = paper.ScaleAndShift(0.1, 0.1)
    image = torch.tensor([0.0, 1.0]).expand(3, 2).reshape(3, 2, 1)
    seg = torch.tensor([[-1, 0], [1, 2]])[None]
    pairs = []
    for _ in range(300):
        result = transform(image=image.clone(), segmentation=seg.clone())
        assert torch.equal(result["segmentation"], seg)
        assert result["image"].dtype == image.dtype
        pairs.append(result["image"][..., 0].numpy())
    offsets = np.stack(pairs)[..., 0]
    factors = np.stack(pairs)[..., 1] - offsets
    assert (np.abs(offsets) <= 0.1).all()
    assert (np.abs(factors - 1) <= 0.1 + 1e-6).all()
    for drawn in (offsets, factors - 1):
        assert drawn.min() < -0.09
        assert drawn.max() > 0.09
        assert not np.isclose(drawn[:, 0], drawn[:, 1]).any()


@pytest.mark.parametrize("patch", [(9, 9), (9, 9, 9)])
def test_only_rotation_intensity_and_flips(patch: tuple[int, ...]) -> None:
    """With the rotation taken out, a patch is a flip of the input, scaled and shifted within the brain."""
    dim = len(patch)
    transforms = paper.paper_training_transforms(
        patch, 0.0, None, tuple(range(dim)), False, use_mask_for_norm=[True, True]
    )
    image = torch.rand(2, *patch) + 1
    seg = torch.randint(0, 3, (1, *patch)).to(torch.int16)
    seg[0, 0] = -1
    image[:, seg[0] == -1] = 0
    seen = set()
    for _ in range(40):
        result = transforms(image=image.clone(), segmentation=seg.clone())
        flips = [
            axes
            for code in range(2**dim)
            for axes in [[i + 1 for i in range(dim) if code >> i & 1]]
            if torch.equal(torch.flip(seg, axes).clamp_min(0), result["segmentation"])
        ]
        assert len(flips) == 1
        seen.add(tuple(flips[0]))
        outside, original = torch.flip(seg, flips[0])[0] == -1, torch.flip(image, flips[0])
        assert not result["image"][:, outside].any(), "the background stays 0, whatever the shift"
        for channel, before in zip(result["image"], original, strict=True):
            factor, offset = np.polyfit(before[~outside].numpy(), channel[~outside].numpy(), 1)
            assert abs(factor - 1) < 0.1 + 1e-4
            assert abs(offset) < 0.1 + 1e-3
            assert torch.allclose(before[~outside] * factor + offset, channel[~outside], atol=1e-4)
    assert len(seen) == 2**dim


def test_loaded_patch_covers_the_rotated_one() -> None:
    """80 (cos 10 + sin 10) = 92.7 voxels; nothing but image is sampled from a patch of that size."""
    assert paper.initial_patch_size((80, 80, 80), False).tolist() == [93, 93, 93]
    assert paper.initial_patch_size((80, 80), False).tolist() == [93, 93]
    assert paper.initial_patch_size((16, 80, 80), True).tolist() == [16, 93, 93]
    assert paper.initial_patch_size((16, 80), False).tolist() == [30, 82]
    for patch in ((12, 20, 16), (12, 20)):
        loaded = torch.ones(1, *paper.initial_patch_size(patch, False))
        transform = SpatialTransform(patch, 0, False, p_rotation=1, rotation=paper.OneAxisRotation(paper.ROTATION))
        for _ in range(50):
            assert transform(image=loaded.clone())["image"].min() > 0.999


def test_anisotropic_plans_rotate_within_the_slices() -> None:
    transforms = paper.paper_training_transforms((4, 16, 16), paper.OneAxisRotation(paper.ROTATION), None, None, True)
    image = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 20, 20).clone() + 1
    result = transforms(image=image, segmentation=torch.zeros(1, 4, 20, 20, dtype=torch.int16))["image"]
    assert result.shape == (1, 4, 16, 16)
    inner = result[0, :, 4:12, 4:12].flatten(1)
    assert torch.allclose(inner, inner[:, :1].expand_as(inner), atol=1e-4), "slices do not mix"


# --- in the trainer ---------------------------------------------------------------------------------------------------
def paper_trainer(
    root: Path,
    plans_dict: dict[str, Any] | None = None,
    cls: type[Any] = nnUNetTrainerMGML,
    dataset_json: dict[str, Any] | None = None,
    absent: dict[str, int] | None = None,
    **options: Any,
) -> Any:
    plans_dict = plans_dict or plans()
    write_dataset(root, dataset_json, plans_dict=copy.deepcopy(plans_dict), absent=absent)
    return make_trainer(cls, plans_dict, {"augmentation": "paper", **options}, dataset_json)


@pytest.mark.parametrize("layout", ["3d", "2d", "anisotropic", "labels", "ignore"])
def test_every_layout_loads_and_trains(layout: str, nnunet_folders: Path) -> None:
    dataset_json = copy.deepcopy(BRATS_JSON)
    if layout == "labels":
        dataset_json["labels"] = {"background": 0, "edema": 1, "core": 2, "enhancing": 3}
        del dataset_json["regions_class_order"]
    if layout == "ignore":
        dataset_json["labels"]["ignore"] = 4
    kind = {"2d": plans(patch=(16, 16)), "anisotropic": plans(**ANISOTROPIC)}.get(layout, plans())
    # all patches around foreground: the tiny dataset has no list of annotated voxels, which ignore labels else need
    trainer = paper_trainer(
        nnunet_folders, kind, dataset_json=dataset_json, absent={"case_1": 2}, oversample_foreground_percent=1.0
    )
    trainer.initialize()
    train, _ = trainer.get_dataloaders()
    _, dummy_2d, _, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    patch = tuple(trainer.configuration_manager.patch_size)
    assert dummy_2d == (layout == "anisotropic")
    assert axes == tuple(range(len(patch))) == tuple(trainer.inference_allowed_mirroring_axes)
    for _ in range(4):
        batch = next(train)
        assert tuple(batch["data"].shape) == (2, 4, *patch)
        assert tuple(batch["target"][0].shape[2:]) == patch
        assert batch["target"][0].shape[1] == {"labels": 1, "ignore": 4}.get(layout, 3)
        for sample, available in zip(batch["data"], batch["available"], strict=True):
            assert not sample[~available].any(), "an empty channel stays empty"
            assert all(channel.any() for channel in sample[available])
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_cascade_gets_the_previous_stage_unchanged() -> None:
    """One-hot channels come after the modalities; scale and shift do not reach them."""
    transforms = paper.paper_training_transforms(
        (8, 8, 8),
        paper.OneAxisRotation(paper.ROTATION),
        None,
        (0, 1, 2),
        False,
        is_cascaded=True,
        foreground_labels=[1, 2, 3],
    )
    image, seg = torch.randn(4, 10, 10, 10), torch.randint(0, 4, (2, 10, 10, 10)).to(torch.int16)
    result = transforms(image=image, segmentation=seg)
    assert result["image"].shape == (7, 8, 8, 8)
    assert result["segmentation"].shape == (1, 8, 8, 8)
    assert set(result["image"][4:].unique().tolist()) == {0.0, 1.0}


def test_a_cascade_trainer_sees_them_too(nnunet_folders: Path) -> None:
    plans_dict = plans()
    (config,) = plans_dict["configurations"].values()
    plans_dict["configurations"] = {
        "3d_cascade_fullres": {**config, "previous_stage": "3d_lowres"},
        "3d_lowres": {**configuration(), "next_stage": "3d_cascade_fullres"},
    }
    trainer = make_trainer(nnUNetTrainerMGML, plans_dict, {"augmentation": "paper"})
    assert trainer.is_cascaded
    rotation, dummy_2d, _, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transforms = trainer.get_training_transforms(
        (16, 16, 16),
        rotation,
        None,
        axes,
        dummy_2d,
        use_mask_for_norm=[True] * 4,
        is_cascaded=trainer.is_cascaded,
        foreground_labels=trainer.label_manager.foreground_labels,
        regions=trainer.label_manager.foreground_regions,
        ignore_label=None,
    )
    result = transforms(image=torch.randn(4, 18, 18, 18), segmentation=torch.ones(2, 18, 18, 18, dtype=torch.int16))
    assert result["image"].shape == (7, 16, 16, 16)
    assert result["segmentation"].shape == (3, 16, 16, 16)


def test_default_is_nnunets_own(nnunet_folders: Path) -> None:
    trainer = paper_trainer(nnunet_folders, augmentation="nnunet")
    arguments = ((16, 16, 16), (-0.5, 0.5), None, (0, 1, 2), False)
    ours, stock = trainer.get_training_transforms(*arguments), nnUNetTrainer.get_training_transforms(*arguments)
    assert [type(t) for t in ours.transforms] == [type(t) for t in stock.transforms]
    rotation, _, size, _ = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert np.allclose(np.rad2deg(rotation), (-30, 30))
    assert (size > 16).all()
    kinds = [type(t) for t in paper_kinds(trainer, "paper")]
    assert kinds.count(SpatialTransform) == kinds.count(MirrorTransform) == kinds.count(paper.ScaleAndShift) == 1


def paper_kinds(trainer: Any, augmentation: str) -> list[Any]:
    trainer.options = trainer.options.updated({"augmentation": augmentation})
    return trainer.get_training_transforms((16, 16, 16), 0.1, None, (0, 1, 2), False).transforms


def test_modality_dropout_honours_it_too(nnunet_folders: Path) -> None:
    trainer = paper_trainer(nnunet_folders, cls=nnUNetTrainerModalityDropout)
    assert any(isinstance(t, paper.ScaleAndShift) for t in paper_kinds(trainer, "paper"))


def test_deterministic_is_switched_on_late_enough(nnunet_folders: Path, restored: None) -> None:
    """nnU-Net's run_training sets cudnn.benchmark after the trainer is built; on_train_start comes after that."""
    trainer = paper_trainer(nnunet_folders, deterministic=True)
    cudnn.deterministic, cudnn.benchmark = False, True
    trainer.on_train_start()
    assert cudnn.deterministic
    assert not cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_not_deterministic_unless_asked(nnunet_folders: Path, restored: None) -> None:
    cudnn.benchmark = True
    paper_trainer(nnunet_folders).on_train_start()
    assert cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_augmentation_does_not_decide_by_the_clock(deterministic: bool, nnunet_folders: Path) -> None:
    """nnU-Net's blur times convolution and FFT against each other and keeps the faster."""
    trainer = paper_trainer(nnunet_folders, augmentation="nnunet", deterministic=deterministic)
    transforms = trainer.get_training_transforms((16, 16, 16), (-0.5, 0.5), None, (0, 1, 2), False)
    timing = [module for module in every_transform(transforms) if getattr(module, "benchmark", False)]
    assert len(timing) == (0 if deterministic else 1)


def every_transform(transform: Any) -> Iterator[Any]:
    yield transform
    for value in vars(transform).values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BasicTransform):
                yield from every_transform(inner)


@pytest.mark.parametrize("augmentation", ["paper", "nnunet"])
def test_two_seeded_runs_are_the_same_run(
    augmentation: str, nnunet_folders: Path, restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"augmentation": augmentation, "deterministic": True, "num_epochs": 1, "validate_subsets": False}
    first = paper_trainer(nnunet_folders, **options)
    first.run_training()
    monkeypatch.setenv("nnUNet_results", str(nnunet_folders / "again"))
    second = make_trainer(nnUNetTrainerMGML, plans(), options)
    second.run_training()
    for name, value in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value), name
