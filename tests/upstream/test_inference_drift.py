"""What inference relies on in nnU-Net, pinned: a change fails here, by name, before it fails for users."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from nnunetv2.inference import predict_from_raw_data as upstream
from nnunetv2.inference.data_iterators import preprocess_fromfiles_save_to_queue
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from nnunetv2_mgml.inference.predictor import MGMLPredictor

VERSION = f"nnunetv2 {version('nnunetv2')}"

SIGNATURES: dict[Callable[..., Any], str] = {
    nnUNetPredictor.__init__: "self, tile_step_size, use_gaussian, use_mirroring, perform_everything_on_device, "
    "device, verbose, verbose_preprocessing, allow_tqdm",
    nnUNetPredictor.initialize_from_trained_model_folder: "self, model_training_output_dir, use_folds, checkpoint_name",
    nnUNetPredictor.manual_initialization: "self, network, plans_manager, configuration_manager, parameters, "
    "dataset_json, trainer_name, inference_allowed_mirroring_axes",
    nnUNetPredictor._manage_input_and_output_lists: "self, list_of_lists_or_source_folder, "
    "output_folder_or_list_of_truncated_output_files, "
    "folder_with_segs_from_prev_stage, overwrite, part_id, num_parts, "
    "save_probabilities",
    nnUNetPredictor._internal_get_data_iterator_from_lists_of_filenames: (
        "self, input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated, num_processes"
    ),
    nnUNetPredictor.get_data_iterator_from_raw_npy_data: (
        "self, image_or_list_of_images, segs_from_prev_stage_or_list_of_segs_from_prev_stage, "
        "properties_or_list_of_properties, truncated_ofname, num_processes"
    ),
    nnUNetPredictor.predict_from_list_of_npy_arrays: (
        "self, image_or_list_of_images, segs_from_prev_stage_or_list_of_segs_from_prev_stage, "
        "properties_or_list_of_properties, truncated_ofname, num_processes, save_probabilities, "
        "num_processes_segmentation_export"
    ),
    nnUNetPredictor.predict_from_data_iterator: "self, data_iterator, save_probabilities, "
    "num_processes_segmentation_export",
    nnUNetPredictor.predict_from_files: "self, list_of_lists_or_source_folder, "
    "output_folder_or_list_of_truncated_output_files, save_probabilities, "
    "overwrite, num_processes_preprocessing, num_processes_segmentation_export, "
    "folder_with_segs_from_prev_stage, num_parts, part_id",
    nnUNetPredictor.predict_from_files_sequential: "self, list_of_lists_or_source_folder, "
    "output_folder_or_list_of_truncated_output_files, "
    "save_probabilities, overwrite, folder_with_segs_from_prev_stage",
    nnUNetPredictor.predict_single_npy_array: "self, input_image, image_properties, segmentation_previous_stage, "
    "output_file_truncated, save_or_return_probabilities",
    nnUNetPredictor.predict_sliding_window_return_logits: "self, input_image",
    nnUNetPredictor.predict_logits_from_preprocessed_data: "self, data",
    DefaultPreprocessor.run_case_npy: "self, data, seg, properties, plans_manager, configuration_manager, dataset_json",
    export_prediction_from_logits: "predicted_array_or_file, properties_dict, configuration_manager, plans_manager, "
    "dataset_json_dict_or_file, output_file_truncated, save_probabilities, "
    "num_threads_torch",
    convert_predicted_logits_to_segmentation_with_correct_shape: (
        "predicted_logits, plans_manager, configuration_manager, label_manager, properties_dict, "
        "return_probabilities, num_threads_torch"
    ),
    convert_labelmap_to_one_hot: "segmentation, all_labels, output_dtype",
    recursive_find_trainer_class_by_name: "trainer_name",
    upstream.predict_entry_point: "",
    upstream.predict_entry_point_modelfolder: "",
}

MIRRORED: dict[Callable[..., Any], str] = {
    nnUNetPredictor._manage_input_and_output_lists: "a67baf105c411cc3",
    nnUNetPredictor.predict_from_files: "98743e2bebd18692",
    nnUNetPredictor.predict_from_files_sequential: "1f131b675464ba45",
    nnUNetPredictor.predict_from_data_iterator: "941d5215d249dd27",
    nnUNetPredictor.predict_single_npy_array: "3913ecda6efd1a1b",
    nnUNetPredictor.predict_logits_from_preprocessed_data: "0511306e59b41e26",
    DefaultPreprocessor.run_case: "90e13fc210745c34",
    preprocess_fromfiles_save_to_queue: "74976ec124b4168f",
    upstream.predict_entry_point: "23e38cce8088d65b",
    upstream.predict_entry_point_modelfolder: "422a68a42969a7e4",
}
"""Bodies we mirror, or whose inner order we rely on -> hash of the source ours was written against."""


def source_hash(function: Callable[..., Any]) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signature(function: Callable[..., Any]) -> None:
    assert ", ".join(inspect.signature(function).parameters) == SIGNATURES[function], (
        f"{function.__qualname__} has changed in {VERSION}: adapt nnunetv2_mgml/inference"
    )


@pytest.mark.parametrize("function", MIRRORED, ids=lambda f: f.__qualname__)
def test_mirrored_body(function: Callable[..., Any]) -> None:
    assert source_hash(function) == MIRRORED[function], (
        f"{function.__qualname__} has changed in {VERSION}: compare nnunetv2_mgml/inference, then update the hash"
    )


def test_our_overrides_take_what_upstream_takes() -> None:
    for function in SIGNATURES:
        owner, _, name = function.__qualname__.rpartition(".")
        ours = getattr(MGMLPredictor, name, None)
        if owner != nnUNetPredictor.__name__ or ours is function or name in ("__init__", "manual_initialization"):
            continue
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(function).parameters), name


def test_the_export_makes_its_writer_through_the_plans() -> None:
    source = inspect.getsource(export_prediction_from_logits)
    for used in ("plans_manager.image_reader_writer_class()", "rw.write_seg(segmentation_final, output_file_truncated"):
        assert used in source, f"export_prediction_from_logits no longer contains {used} ({VERSION})"


def test_the_sliding_window_asks_the_label_manager_for_its_heads_only() -> None:
    functions = (
        nnUNetPredictor.predict_sliding_window_return_logits,
        nnUNetPredictor._internal_predict_sliding_window_return_logits,
        nnUNetPredictor._internal_maybe_mirror_and_predict,
        nnUNetPredictor.predict_logits_from_preprocessed_data,
    )
    found = re.findall(r"label_manager[.\w]*", "".join(map(inspect.getsource, functions)))
    assert set(found) == {"label_manager.num_segmentation_heads"}, (
        f"changed in {VERSION}: see upstream/sliding_window.py"
    )


def test_the_entry_points_use_the_names_we_exchange() -> None:
    for entry_point in (upstream.predict_entry_point, upstream.predict_entry_point_modelfolder):
        source = inspect.getsource(entry_point)
        for used in ("parser.parse_args()", "predictor = nnUNetPredictor(", "predictor.predict_from_files("):
            assert used in source, f"{entry_point.__name__} no longer contains {used} ({VERSION})"
