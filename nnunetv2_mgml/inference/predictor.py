"""`MGMLPredictor`: nnU-Net's predictor for cases of which some modalities are missing.

Overridden upstream hooks: ``initialize_from_trained_model_folder``, ``manual_initialization``,
``_manage_input_and_output_lists``, ``_internal_get_data_iterator_from_lists_of_filenames``,
``get_data_iterator_from_raw_npy_data``, ``predict_from_data_iterator``, ``predict_from_files``,
``predict_from_files_sequential``, ``predict_single_npy_array``, ``predict_sliding_window_return_logits``. Without
``missing_modalities`` each of them is upstream's. tests/upstream/test_inference_drift.py fails when one changes.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from numpy.typing import NDArray

from nnunetv2_mgml.inference.arrays import prepare_image, prepare_named
from nnunetv2_mgml.inference.engine import SubsetEngine
from nnunetv2_mgml.inference.inputs import AUTO, parse_missing
from nnunetv2_mgml.inference.model_check import building, check_checkpoint, check_model_folder, check_supported
from nnunetv2_mgml.inference.planning import output_folder, plan_cases
from nnunetv2_mgml.inference.preprocessing import Item, Job, iterate_items, prepare_job
from nnunetv2_mgml.inference.report import PredictionReport
from nnunetv2_mgml.plans.model_files import read_model_files
from nnunetv2_mgml.upstream.checkpoints import loading, trusted
from nnunetv2_mgml.upstream.registration import add_ext_dir

_log = logging.getLogger(__name__)


class MGMLPredictor(SubsetEngine):
    """Predict from any non-empty subset of the modalities a model was trained with.

    Args:
        *args: as for ``nnUNetPredictor``.
        missing_modalities: names that count as missing in every case, whether their files exist or not; ``["auto"]``
            goes by the files that exist, case by case; both may be combined. None: nnU-Net's own behaviour, every
            modality is needed.
        cpu_bfloat16: run the network in bfloat16 on a CPU (faster where the CPU has instructions for it).
        trust_checkpoint: let a model folder run code, as nnU-Net does: only for models of people whose programs you
            would run. Otherwise checkpoints are read as data and plans may name known classes only.
        backend: ``pytorch``, or ``openvino`` on a CPU: the network compiled for each subset it meets (some seconds for
            each and every fold; about half the time of a patch after that), equal up to rounding. Needs
            ``missing_modalities``.
        **kwargs: as for ``nnUNetPredictor``.

    Attributes:
        failures: case name -> message of the cases the last call could not predict; the others were predicted.
        report_file: ``mgml_prediction.json`` of the last call that wrote files.
        report_cases: the cases that call was to predict.
        sequential_part: ``(part_id, num_parts)`` for `predict_from_files_sequential`, which upstream does not split.

    Raises:
        ValueError: ``cpu_bfloat16`` or ``openvino`` on another device, or OpenVINO is not installed.
    """

    # --- the model ----------------------------------------------------------------------------------------------------
    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | str | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """Load a trained model.

        Raises:
            FileNotFoundError: no model there, or a fold without the checkpoint.
            ValueError: an unknown modality name, a trainer that does not support missing modalities, or files that are
                damaged or would run code.
        """
        add_ext_dir()
        folds = check_model_folder(model_training_output_dir, use_folds, checkpoint_name)
        read_model_files(Path(model_training_output_dir), trusted(self.trust_checkpoint))
        for fold in folds:
            check_checkpoint(
                Path(model_training_output_dir, f"fold_{fold}", checkpoint_name), trusted(self.trust_checkpoint)
            )
        with loading(model_training_output_dir, self.trust_checkpoint), building(model_training_output_dir):
            super().initialize_from_trained_model_folder(str(model_training_output_dir), folds, checkpoint_name)
        self._origin = {
            "folder": os.path.abspath(model_training_output_dir),
            "folds": folds,
            "checkpoint": checkpoint_name,
        }
        self._check_missing()

    def manual_initialization(self, *args: Any, **kwargs: Any) -> None:
        """As upstream, for a network at hand; raises ValueError as `initialize_from_trained_model_folder` does."""
        super().manual_initialization(*args, **kwargs)
        self._origin = {}
        self._check_missing()

    def _check_missing(self) -> None:
        if self.missing_modalities is not None:
            parse_missing(self.missing_modalities, self.channels)
            check_supported(self.network, self.trainer_name)

    # --- files --------------------------------------------------------------------------------------------------------
    def predict_from_files(
        self,
        list_of_lists_or_source_folder: Any,
        output_folder_or_list_of_truncated_output_files: Any,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = default_num_processes,
        num_processes_segmentation_export: int = default_num_processes,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
    ) -> list[Any] | None:
        """Predict a folder of cases, or lists of files, as upstream does; ``num_processes_*`` may be 0.

        A case that cannot be predicted is listed in `failures` and does not stop the others.

        Returns:
            Per case None (written to a file, or failed) or the segmentation ``(z, y, x)``; None where there is no case.

        Raises:
            ValueError, FileNotFoundError: wrong arguments, found before any work.
        """
        source, target = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
        source, target = _as_text(source), _as_text(target)
        previous = self.configuration_manager.previous_stage_name
        if previous is not None and folder_with_segs_from_prev_stage is None:
            raise ValueError(
                f"This model is the second stage of a cascade: give the folder with the predictions of "
                f"{previous} (-prev_stage_predictions)."
            )
        self.failures = {}
        try:
            results: list[Any] | None = super().predict_from_files(
                source,
                target,
                save_probabilities,
                overwrite,
                num_processes_preprocessing,
                num_processes_segmentation_export,
                folder_with_segs_from_prev_stage,
                num_parts,
                part_id,
            )
            return results
        finally:
            if self._report is not None:
                self._report.save()
                self._report = None

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: Any,
        output_folder_or_list_of_truncated_output_files: Any,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
    ) -> list[Any] | None:
        """`predict_from_files` without worker processes."""
        files = (list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files)
        if self.missing_modalities is None:
            plain: list[Any] | None = super().predict_from_files_sequential(
                *files, save_probabilities, overwrite, folder_with_segs_from_prev_stage
            )
            return plain
        part_id, num_parts = self.sequential_part
        return self.predict_from_files(
            *files, save_probabilities, overwrite, 0, 0, folder_with_segs_from_prev_stage, num_parts, part_id
        )

    def _manage_input_and_output_lists(
        self,
        list_of_lists_or_source_folder: Any,
        output_folder_or_list_of_truncated_output_files: Any,
        folder_with_segs_from_prev_stage: str | None = None,
        overwrite: bool = True,
        part_id: int = 0,
        num_parts: int = 1,
        save_probabilities: bool = False,
    ) -> tuple[list[Any], list[str | None] | None, list[str | None]]:
        """As upstream, with a `Case` in place of each list of files."""
        source, target = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
        if self.missing_modalities is None:
            plain: tuple[list[Any], list[str | None] | None, list[str | None]] = super()._manage_input_and_output_lists(
                source, target, folder_with_segs_from_prev_stage, overwrite, part_id, num_parts, save_probabilities
            )
            return plain
        plan = plan_cases(
            source,
            target,
            folder_with_segs_from_prev_stage,
            self.dataset_json["file_ending"],
            self.channels,
            overwrite=overwrite,
            part_id=part_id,
            num_parts=num_parts,
            save_probabilities=save_probabilities,
        )
        folder = output_folder(target)
        if folder is not None:
            about = {
                **self._origin,
                "trainer": self.trainer_name,
                "missing_modalities": self.missing_modalities,
                "tile_step_size": self.tile_step_size,
                "use_mirroring": self.use_mirroring,
                "device": str(self.device),
                "cpu_bfloat16": self.cpu_bfloat16,
                "backend": self.backend,
            }
            self._report = PredictionReport(
                folder, about, self.channels, keep=not overwrite, part_id=part_id, num_parts=num_parts
            )
            self.report_file, self.report_cases = self._report.path, [planned.case.name for planned in plan.todo]
            self._report.begin(self.report_cases, [planned.case.name for planned in plan.done])
        _log.info("%d cases to predict, %d are there already", len(plan.todo), len(plan.done))
        return (
            [planned.case for planned in plan.todo],
            [planned.ofile for planned in plan.todo],
            [planned.previous_stage for planned in plan.todo],
        )

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[Any],
        seg_from_prev_stage_files: list[str | None],
        output_filenames_truncated: list[str | None] | None,
        num_processes: int,
    ) -> Iterator[Item]:
        if self.missing_modalities is None:
            plain: Iterator[Item] = super()._internal_get_data_iterator_from_lists_of_filenames(
                input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated, num_processes
            )
            return plain
        outputs = output_filenames_truncated or [None] * len(input_list_of_lists)
        return iterate_items(
            [
                Job(
                    case.name,
                    ofile,
                    functools.partial(prepare_job, case, self.missing_modalities, self.model, previous, ofile),
                )
                for case, previous, ofile in zip(input_list_of_lists, seg_from_prev_stage_files, outputs, strict=True)
            ],
            num_processes,
        )

    # --- arrays -------------------------------------------------------------------------------------------------------
    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: Any,
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: Any,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
    ) -> Iterator[Item]:
        """As upstream. An image is ``(M, z, y, x)``, or a tuple of ``M`` volumes with None for a missing one."""
        arguments = (
            image_or_list_of_images,
            segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties,
            truncated_ofname,
        )
        if self.missing_modalities is None:
            plain: Iterator[Item] = super().get_data_iterator_from_raw_npy_data(*arguments, num_processes)
            return plain
        self.failures = {}
        count = len(image_or_list_of_images) if isinstance(image_or_list_of_images, list) else 1
        columns = [value if isinstance(value, list) else [value] * count for value in arguments]
        jobs = []
        for number, (image, previous, properties, ofile) in enumerate(zip(*columns, strict=True)):
            name = os.path.basename(ofile) if ofile else f"image {number}"
            jobs.append(
                Job(
                    name,
                    ofile,
                    functools.partial(
                        prepare_image, name, image, properties, previous, self.missing_modalities, self.model, ofile
                    ),
                )
            )
        return iterate_items(jobs, num_processes)

    def predict_single_npy_array(
        self,
        input_image: Any,
        image_properties: dict[str, Any],
        segmentation_previous_stage: NDArray[Any] | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> Any:
        """As upstream. The image is ``(M, z, y, x)``, or a tuple of ``M`` volumes with None for a missing one.

        Raises:
            CaseError: the image cannot be predicted.
        """
        if self.missing_modalities is None:
            return super().predict_single_npy_array(
                input_image,
                image_properties,
                segmentation_previous_stage,
                output_file_truncated,
                save_or_return_probabilities,
            )
        name = os.path.basename(output_file_truncated) if output_file_truncated else "image"
        item = prepare_image(
            name,
            input_image,
            image_properties,
            segmentation_previous_stage,
            self.missing_modalities,
            self.model,
            output_file_truncated,
        )
        function, arguments = self._export_call(item, self._logits(item), save_or_return_probabilities)
        return function(*arguments)

    def predict_case(
        self,
        images: Mapping[str, NDArray[Any] | str | Path | None],
        *,
        spacing: Sequence[float] | None = None,
        properties: dict[str, Any] | None = None,
        previous_stage: NDArray[Any] | str | Path | None = None,
        return_probabilities: bool = False,
    ) -> Any:
        """Predict one case given by modality names; names left out (or None) are missing.

        Args:
            images: name -> path, or ``(z, y, x)`` array as the model's reader returns it.
            spacing: for arrays, in mm and in the order of the array axes.
            properties: for arrays, all image properties instead of ``spacing``.
            previous_stage: a cascade's previous-stage labels, path or ``(z, y, x)`` array.
            return_probabilities: also return ``(heads, z, y, x)`` float32 probabilities.

        Returns:
            The label map ``(z, y, x)`` uint8, or a tuple with the probabilities.

        Raises:
            ValueError: an unknown name, no modality, arrays without spacing, files that do not fit (`CaseError`), or a
                model that does not support missing modalities.
        """
        if properties is None and spacing is not None:
            properties = {"spacing": [float(s) for s in spacing]}
        check_supported(self.network, self.trainer_name)
        item = prepare_named("given", images, properties, previous_stage, self.missing_modalities or [AUTO], self.model)
        function, arguments = self._export_call(item, self._logits(item), return_probabilities)
        return function(*arguments)


def _as_text(paths: Any) -> Any:
    """Replace Path objects, also in lists: upstream looks for ``str`` and writes its arguments as JSON."""
    if isinstance(paths, (list, tuple)):
        return [_as_text(path) for path in paths]
    return str(paths) if isinstance(paths, Path) else paths
