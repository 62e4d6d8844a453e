"""What we rely on in nnU-Net, pinned: a new release that changes it fails here, by name, before it fails for users."""

from __future__ import annotations

import hashlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from nnunetv2.experiment_planning import plan_and_preprocess_api
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run import run_training
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mgml.upstream.blur import stop_timing
from nnunetv2_mgml.upstream.validation_cases import announced_cases
from nnunetv2_mgml.upstream.wrappers import bare

VERSIONS = f"nnunetv2 {version('nnunetv2')}, dynamic-network-architectures {version('dynamic-network-architectures')}"

SIGNATURES: dict[Callable[..., Any], str] = {
    nnUNetTrainer.__init__: "(self, plans, configuration, fold, dataset_json, device)",
    nnUNetTrainer.initialize: "(self)",
    nnUNetTrainer.build_network_architecture: "(plans_manager, configuration_manager, num_input_channels, "
    "num_output_channels, enable_deep_supervision)",
    nnUNetTrainer.get_dataloaders: "(self)",
    nnUNetTrainer.configure_optimizers: "(self)",
    nnUNetTrainer.on_train_start: "(self)",
    nnUNetTrainer.on_train_epoch_start: "(self)",
    nnUNetTrainer.train_step: "(self, batch)",
    nnUNetTrainer.validation_step: "(self, batch)",
    nnUNetTrainer.on_train_epoch_end: "(self, train_outputs)",
    nnUNetTrainer.on_epoch_end: "(self)",
    nnUNetTrainer.save_checkpoint: "(self, filename)",
    nnUNetTrainer.load_checkpoint: "(self, filename_or_checkpoint)",
    nnUNetTrainer.perform_actual_validation: "(self, save_probabilities)",
    nnUNetTrainer.get_training_transforms: "(patch_size, rotation_for_DA, deep_supervision_scales, mirror_axes, "
    "do_dummy_2d_data_aug, use_mask_for_norm, is_cascaded, foreground_labels, "
    "regions, ignore_label)",
    nnUNetTrainer.get_validation_transforms: "(deep_supervision_scales, is_cascaded, foreground_labels, regions, "
    "ignore_label)",
    nnUNetDataLoader.__init__: "(self, data, batch_size, patch_size, final_patch_size, label_manager, "
    "oversample_foreground_percent, sampling_probabilities, pad_sides, "
    "probabilistic_oversampling, transforms)",
    load_pretrained_weights: "(network, fname, verbose)",
    UNetDecoder.__init__: "(self, encoder, num_classes, n_conv_per_stage, deep_supervision, nonlin_first, norm_op, "
    "norm_op_kwargs, dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs, conv_bias)",
    DatasetFingerprintExtractor.__init__: "(self, dataset_name_or_id, num_processes, verbose)",
    DefaultPreprocessor.run: "(self, dataset_name_or_id, configuration_name, plans_identifier, num_processes)",
    DefaultPreprocessor.run_case: "(self, image_files, seg_file, plans_manager, configuration_manager, dataset_json)",
    plan_and_preprocess_api.extract_fingerprint_dataset: "(dataset_id, fingerprint_extractor_class, num_processes, "
    "check_dataset_integrity, clean, verbose, show_progress_bar)",
    plan_and_preprocess_api.preprocess_dataset: "(dataset_id, plans_identifier, configurations, num_processes, "
    "verbose, show_progress_bar)",
    plan_and_preprocess_api.verify_dataset_integrity: "(folder, num_processes)",
    PolyLRScheduler.__init__: "(self, optimizer, initial_lr, max_steps, exponent, current_step)",
}

MIRRORED: dict[Callable[..., Any], str] = {
    nnUNetTrainer.get_dataloaders: "5f59e2b907cfa2d1",
    nnUNetTrainer.train_step: "c8993de84c8c419f",
    UNetDecoder.forward: "ad64097d826e71c0",
    StackedConvBlocks.forward: "fc393994d0d6d184",
    ConvDropoutNormReLU.forward: "afeb6b581899f9c3",
    DatasetFingerprintExtractor.run: "02e10bff6e8d2e81",
    DatasetFingerprintExtractor.analyze_case: "8a6251b7db882c28",
}
"""Bodies we wrote our own version of -> hash of the source ours was written against."""


def source_hash(function: Callable[..., Any]) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signature(function: Callable[..., Any]) -> None:
    found = "(" + ", ".join(inspect.signature(function).parameters) + ")"
    assert found == SIGNATURES[function], f"{function.__qualname__} has changed in {VERSIONS}: adapt our override"


@pytest.mark.parametrize("function", MIRRORED, ids=lambda f: f.__qualname__)
def test_mirrored_body(function: Callable[..., Any]) -> None:
    assert source_hash(function) == MIRRORED[function], (
        f"{function.__qualname__} has changed in {VERSIONS}: compare it with our version, then update the hash"
    )


def test_a_compiled_network_is_found_behind_its_wrappers() -> None:
    network = torch.nn.Linear(1, 1)
    assert bare(network) is network
    assert bare(torch.compile(network)) is network


def test_the_compiler_is_not_imported_before_somebody_compiles() -> None:
    """It takes as long as PyTorch itself, and `mgml plan` waits for it."""
    code = "import sys, nnunetv2_mgml.commands.plan; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "False"]


def test_loggers_still_stand_in_a_list() -> None:
    source = inspect.getsource(nnunet_logger.MetaLogger)
    assert "self.loggers.append(WandbLogger(" in source
    assert "logger.log(key, value, step)" in source
    assert "logger.update_config(config)" in source


def test_attributes_we_read() -> None:
    source = inspect.getsource(nnUNetTrainer.__init__) + inspect.getsource(nnUNetTrainer.initialize)
    for name in (
        "num_epochs",
        "num_iterations_per_epoch",
        "num_val_iterations_per_epoch",
        "initial_lr",
        "weight_decay",
        "oversample_foreground_percent",
        "save_every",
        "label_manager",
        "configuration_manager",
        "plans_manager",
        "dataset_json",
        "grad_scaler",
        "local_rank",
        "is_ddp",
        "dataset_class",
        "was_initialized",
        "network",
        "optimizer",
        "loss",
        "logger",
        "output_folder",
        "current_epoch",
    ):
        assert f"self.{name}" in source, f"nnUNetTrainer no longer has {name} ({VERSIONS})"
    assert 'plans.pop("continue_training")' in source, f"nnUNetTrainer no longer pops continue_training ({VERSIONS})"


def test_training_still_loads_pretrained_weights_by_the_name_we_replace() -> None:
    source = inspect.getsource(run_training.maybe_load_checkpoint)
    assert "load_pretrained_weights(nnunet_trainer.network, pretrained_weights_file" in source
    assert "nnunet_trainer.initialize()" in source, "our trainers offer to take weights when they are initialised"


def test_final_validation_still_loads_cases_through_the_dataset_class() -> None:
    source = inspect.getsource(nnUNetTrainer.perform_actual_validation)
    assert "self.dataset_class(" in source
    assert "dataset_val.load_case(" in source


def test_the_loss_reads_only_what_we_give_it() -> None:
    source = inspect.getsource(nnUNetTrainer._build_loss) + inspect.getsource(
        nnUNetTrainer._get_deep_supervision_scales
    )
    given = {"label_manager", "configuration_manager", "enable_deep_supervision", "is_ddp"}
    given |= {"_do_i_compile", "_get_deep_supervision_scales"}
    assert set(re.findall(r"self\.(\w+)", source)) == given, f"nnUNetTrainer's loss has changed in {VERSIONS}"


def test_an_exchanged_dataset_class_says_what_comes_next_and_is_put_back() -> None:
    class Cases:
        def __init__(self, folder: str, identifiers: list[str], previous: str | None) -> None:
            self.source_folder, self.identifiers = folder, identifiers
            self.folder_with_segs_from_previous_stage = previous

        def load_case(self, identifier: str) -> str:
            return f"data of {identifier}"

    told: list[tuple[str, list[str], str]] = []

    def announce(dataset: Any, case: str) -> None:
        told.append((dataset.source_folder, dataset.identifiers, case))

    trainer = SimpleNamespace(dataset_class=Cases)
    with announced_cases(trainer, announce):
        assert trainer.dataset_class("folder", ["a", "b"], None).load_case("b") == "data of b"
    assert told == [("folder", ["b"], "b")]
    assert trainer.dataset_class is Cases


def test_loading_a_checkpoint_still_asks_the_optimizer_of_the_trainer() -> None:
    source = inspect.getsource(nnUNetTrainer.load_checkpoint)
    assert source.count("self.optimizer") == source.count("self.optimizer.load_state_dict(checkpoint[") == 1


def test_the_blur_still_times_itself_unless_told_not_to() -> None:
    blur = GaussianBlurTransform(blur_sigma=1.0, benchmark=True)
    assert blur.benchmark is True
    stop_timing(ComposeTransforms([RandomTransform(blur)]))
    assert blur.benchmark is False
    assert "GaussianBlurTransform(" in inspect.getsource(nnUNetTrainer.get_training_transforms)
    assert "benchmark=True" in inspect.getsource(nnUNetTrainer.get_training_transforms)
