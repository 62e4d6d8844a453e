from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import BRATS_JSON, options_with, plans
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.dataloading.availability import cache_path, case_availability, present_channels
from nnunetv2_mgml.dataloading.loader import MGMLDataLoader, visible_modalities
from nnunetv2_mgml.dataloading.masking import SubsetSampler, build_sampler, missing_rates
from nnunetv2_mgml.dataloading.teacher_view import stronger_intensity_transforms, teacher_view
from nnunetv2_mgml.modalities import BRATS_CHANNELS, all_subsets

SCHEMES = ("uniform_subset", "uniform_count", "bernoulli", "fixed")


def sampler(scheme: str, modalities: int = 4, rate: float = 0.5) -> SubsetSampler:
    return SubsetSampler(scheme, (rate,) * modalities)


@given(st.data(), st.sampled_from(SCHEMES), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=200)
def test_mask_is_a_non_empty_subset_of_what_exists(
    data: st.DataObject, scheme: str, modalities: int, seed: int
) -> None:
    row = st.lists(st.booleans(), min_size=modalities, max_size=modalities).filter(any)
    available = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
    mask = sampler(scheme, modalities).sample(available, np.random.default_rng(seed))
    assert mask.dtype == bool
    assert mask.shape == available.shape
    assert mask.any(axis=1).all()
    assert not (mask & ~available).any()
    assert np.array_equal(mask, sampler(scheme, modalities).sample(available, np.random.default_rng(seed)))


def draw(which: SubsetSampler, available: list[bool], count: int = 15000) -> Counter[tuple[bool, ...]]:
    masks = which.sample(np.tile(np.array(available), (count, 1)), np.random.default_rng(3))
    return Counter(map(tuple, masks.tolist()))


def test_uniform_subset_draws_each_subset_alike() -> None:
    counts = draw(sampler("uniform_subset"), [True] * 4)
    assert set(counts) == set(all_subsets(4))
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 36.1  # chi-square, 14 dof, p = 0.001


def test_uniform_subset_of_an_incomplete_case() -> None:
    counts = draw(sampler("uniform_subset"), [True, False, True, False], 3000)
    assert set(counts) == {(True, False, False, False), (False, False, True, False), (True, False, True, False)}
    assert all(abs(n - 1000) < 110 for n in counts.values())


def test_uniform_count_draws_each_size_alike() -> None:
    sizes = Counter(sum(subset) for subset in draw(sampler("uniform_count"), [True] * 4, 8000).elements())
    assert all(abs(sizes[k] - 2000) < 160 for k in (1, 2, 3, 4))


def test_bernoulli_follows_the_rates() -> None:
    which = SubsetSampler("bernoulli", (0.0, 0.2, 0.5, 0.8))
    counts = draw(which, [True] * 4, 10000)
    kept = [sum(n for subset, n in counts.items() if subset[m]) / 10000 for m in range(4)]
    assert np.allclose(kept, [1.0, 0.8, 0.5, 0.2], atol=0.02)  # the first always exists, so nothing is redrawn


def test_fixed_removes_nothing() -> None:
    available = np.array([[True, False, True, True]])
    assert np.array_equal(sampler("fixed").sample(available, np.random.default_rng(0)), available)


def test_empty_sample_is_refused() -> None:
    available = np.array([[True] * 4, [False] * 4, [True] * 4, [False] * 4])
    with pytest.raises(ValueError, match=r"^Sample 1, 3 of the batch has no modality at all; .*preprocess again"):
        sampler("uniform_subset").sample(available, np.random.default_rng(0))


def test_rates_by_name_and_alias() -> None:
    assert missing_rates({"T1c": 0.2, "t2f": 0.9}, BRATS_CHANNELS) == (0.5, 0.2, 0.5, 0.9)
    config = options_with(mask_sampling="bernoulli", modality_missing_rate={"dwi": 0.1})
    with pytest.raises(ValueError, match="Unknown modality 'dwi'"):
        build_sampler(config.sampling, BRATS_CHANNELS)


# --- availability -----------------------------------------------------------------------------------------------------
def write_case(folder: Path, name: str, present: tuple[bool, ...], shape: tuple[int, ...] = (20, 22, 24)) -> None:
    rng = np.random.default_rng(list(name.encode()))
    data = rng.normal(size=(len(present), *shape)).astype(np.float32)
    data[~np.array(present)] = 0
    seg = np.zeros((1, *shape), np.int16)
    seg[0, 6:12, 6:12, 6:12] = 1
    seg[0, 8:10, 8:10, 8:10] = 3
    locations = {region: np.argwhere(np.isin(seg, region)) for region in ((1, 2, 3), (2, 3), (3,))}
    folder.mkdir(exist_ok=True)
    nnUNetDatasetBlosc2.save_case(
        data,
        seg,
        {"class_locations": locations, "spacing": [1.0] * 3},
        str(folder / name),
        chunks=(1, 20, 22, 24),
        blocks=(1, 10, 11, 12),
    )


def test_present_channels_sees_a_single_voxel_anywhere() -> None:
    data = np.zeros((3, 9, 5, 5), np.float32)
    data[0, 0, 0, 0] = 1
    data[2, 4] = np.nan
    assert present_channels(data, 3) == (True, False, True)


def test_an_empty_channel_that_normalisation_moved_is_absent() -> None:
    """CTNormalization turns an empty volume into one negative value everywhere."""
    data = np.random.default_rng(0).normal(size=(2, 6, 5, 5)).astype(np.float32)
    data[1] = -1.33
    assert present_channels(data, 2) == (True, False)


def test_availability_is_scanned_once_and_again_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path, "a", (True, True, True, True))
    write_case(tmp_path, "b", (True, False, True, False))
    dataset = nnUNetDatasetBlosc2(str(tmp_path))
    loaded: list[str] = []
    original = nnUNetDatasetBlosc2.load_case
    monkeypatch.setattr(
        nnUNetDatasetBlosc2, "load_case", lambda self, name: (loaded.append(name), original(self, name))[1]
    )
    expected = {"a": (True,) * 4, "b": (True, False, True, False)}
    assert case_availability(dataset, ["a", "b"], 4) == expected
    assert case_availability(dataset, ["a", "b"], 4) == expected
    assert loaded == ["a", "b"]
    assert set(json.loads(cache_path(tmp_path).read_text())) == {"a", "b"}
    assert infer_dataset_class(str(tmp_path)) is nnUNetDatasetBlosc2  # a cache inside the folder would break this
    for path in tmp_path.glob("b*"):
        path.unlink()
    write_case(tmp_path, "b", (True, True, True, False))
    assert case_availability(dataset, ["a", "b"], 4)["b"] == (True, True, True, False)
    assert loaded == ["a", "b", "b"]


def test_empty_case_and_missing_file_are_named(tmp_path: Path) -> None:
    write_case(tmp_path, "void", (False,) * 4)
    dataset = nnUNetDatasetBlosc2(str(tmp_path))
    with pytest.raises(ValueError, match=r"Case void .* is empty"):
        case_availability(dataset, ["void"], 4)
    with pytest.raises(FileNotFoundError, match="of case gone"):
        case_availability(dataset, ["gone"], 4)


def test_cache_can_be_read_by_others(tmp_path: Path) -> None:
    write_case(tmp_path, "a", (True,) * 4)
    case_availability(nnUNetDatasetBlosc2(str(tmp_path)), ["a"], 4)
    assert cache_path(tmp_path).stat().st_mode & 0o044 == 0o644 & ~_umask() & 0o044
    assert not list(tmp_path.parent.glob("*.tmp"))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_broken_cache_is_rebuilt(tmp_path: Path) -> None:
    write_case(tmp_path, "a", (True, False, True, True))
    cache_path(tmp_path).write_text("{ not json")
    assert case_availability(nnUNetDatasetBlosc2(str(tmp_path)), ["a"], 4)["a"] == (True, False, True, True)
    assert json.loads(cache_path(tmp_path).read_text())["a"]["present"] == [True, False, True, True]


# --- loader -----------------------------------------------------------------------------------------------------------
def loader(
    folder: Path, cls: type[nnUNetDataLoader] = MGMLDataLoader, transforms: object = None, **kwargs: object
) -> nnUNetDataLoader:
    dataset = nnUNetDatasetBlosc2(str(folder))
    labels = PlansManager(plans()).get_label_manager(BRATS_JSON)
    if cls is MGMLDataLoader:
        kwargs = {
            "sampler": sampler("uniform_subset"),
            "availability": case_availability(dataset, dataset.identifiers, 4),
            **kwargs,
        }
    return cls(
        dataset,
        2,
        (16, 16, 16),
        (16, 16, 16),
        labels,
        oversample_foreground_percent=0.33,
        transforms=transforms,
        **kwargs,
    )


def test_batch_is_nnunets_with_a_mask_beside_it(tmp_path: Path) -> None:
    write_case(tmp_path, "a", (True,) * 4)
    write_case(tmp_path, "b", (True,) * 4)
    np.random.seed(0)
    stock = loader(tmp_path, nnUNetDataLoader).generate_train_batch()
    np.random.seed(0)
    ours = loader(tmp_path).generate_train_batch()
    assert set(ours) == {*stock, "available", "visible", "modality_mask"}
    assert torch.equal(ours["data"], stock["data"])
    assert torch.equal(ours["target"], stock["target"])
    assert ours["available"].all()
    assert ours["visible"].dtype == torch.bool
    assert ours["visible"].shape == (2, 4)
    assert visible_modalities(ours) is ours["modality_mask"] is ours["visible"]
    assert visible_modalities({"modality_mask": ours["visible"]}) is ours["visible"], "the older name alone"


def test_masks_follow_numpys_seed(tmp_path: Path) -> None:
    write_case(tmp_path, "a", (True,) * 4)
    masks = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        generator = loader(tmp_path)
        masks.append(torch.stack([generator.generate_train_batch()["visible"] for _ in range(8)]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_missing_channels_stay_zero_through_nnunets_augmentation(tmp_path: Path) -> None:
    """Stock noise makes an empty channel non-zero in about one of ten samples; ours stays empty in all."""
    write_case(tmp_path, "b", (True, False, True, False))
    transforms = nnUNetTrainer.get_training_transforms(
        (16, 16, 16),
        (-0.5, 0.5),
        None,
        (0, 1, 2),
        False,
        use_mask_for_norm=None,
        is_cascaded=False,
        foreground_labels=[1, 2, 3],
        regions=[(1, 2, 3), (2, 3), 3],
        ignore_label=None,
    )
    np.random.seed(0)
    torch.manual_seed(0)
    stock, ours = loader(tmp_path, nnUNetDataLoader, transforms), loader(tmp_path, transforms=transforms)
    spoiled = sum(int(stock.generate_train_batch()["data"][:, 1].ne(0).any()) for _ in range(40))
    assert spoiled > 0, "the reason for zeroing is gone from nnU-Net"
    for _ in range(40):
        batch = ours.generate_train_batch()
        assert not batch["data"][:, [1, 3]].any()
        assert batch["data"][:, 0].any()
        assert batch["available"].tolist() == [[True, False, True, False]] * 2
        assert not batch["visible"][:, [1, 3]].any()


def test_teacher_view_changes_intensities_of_modalities_only() -> None:
    torch.manual_seed(0)
    data = torch.randn(2, 4, 8, 8, 8)
    before = data.clone()
    view = teacher_view(data, 3, stronger_intensity_transforms(), [True, True, False])
    assert torch.equal(data, before)
    assert torch.equal(view[:, 3], data[:, 3])
    assert not torch.equal(view[:, :3], data[:, :3])
    assert view.isfinite().all()


def test_teacher_view_keeps_the_background_where_nnunet_does() -> None:
    """nnU-Net masks with use_mask_for_norm, after its intensity transforms."""
    torch.manual_seed(0)
    data = torch.randn(8, 3, 8, 8, 8)
    data[..., :3] = 0
    masked = [True, False, True]
    view = teacher_view(data, 3, stronger_intensity_transforms(), masked)
    assert not view[:, masked][..., :3].any()
    assert view[:, 1, ..., :3].any(), "the transforms do change it"
    assert view[:, :, ..., 3:].ne(0).all()


@given(
    st.lists(st.sampled_from([0.0, 1e-9, 0.3, 0.999, 1 - 1e-6, 1 - 1e-9, 1 - 1e-15]), min_size=1, max_size=12),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=100)
def test_bernoulli_with_any_rates_ends_and_is_never_empty(rates: list[float], seed: int) -> None:
    which = SubsetSampler("bernoulli", tuple(rates))
    assert which.sample(np.ones((20, len(rates)), bool), np.random.default_rng(seed)).any(axis=1).all()


def test_bernoulli_without_the_one_reliable_modality() -> None:
    """What is left is as good as never there: one of them alone, in proportion to how often each is there."""
    which = SubsetSampler("bernoulli", (0.0, 1 - 1e-9, 1 - 3e-9, 1 - 1e-9))
    counts = draw(which, [False, True, True, True], 10000)
    assert set(counts) == {(False, True, False, False), (False, False, True, False), (False, False, False, True)}
    assert counts[False, False, True, False] == pytest.approx(6000, abs=200)
    assert counts[False, True, False, False] == pytest.approx(2000, abs=160)


def test_bernoulli_is_the_product_of_the_rates_without_the_empty_subset() -> None:
    rates = (0.9, 0.6, 0.8)
    counts = draw(SubsetSampler("bernoulli", rates), [True] * 3, 20000)
    chances = {
        subset: np.prod([1 - rate if kept else rate for kept, rate in zip(subset, rates, strict=True)])
        for subset in all_subsets(3)
    }
    expected = {subset: 20000 * chance / sum(chances.values()) for subset, chance in chances.items()}
    assert set(counts) <= set(expected)
    assert sum((counts[s] - n) ** 2 / n for s, n in expected.items()) < 22.5  # chi-square, 6 dof, p = 0.001
