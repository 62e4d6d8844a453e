"""`MGMLPredictor`: nnU-Net's predictor for cases of which some modalities are missing.

Overridden upstream hooks: ``initialize_from_trained_model_folder``, ``manual_initialization``,
``_manage_input_and_output_lists``, ``_internal_get_data_iterator_from_lists_of_filenames``,
``get_data_iterator_from_raw_npy_data``, ``predict_from_data_iterator``, ``predict_from_files``,
``predict_from_files_sequential``, ``predict_single_npy_array``, ``predict_sliding_window_return_logits``. Those
decorated by `unless_stock` are upstream's where no ``missing_modalities`` were given.
tests/upstream/test_inference_drift.py fails when one changes.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from numpy.typing import ArrayLike, NDArray

from nnunetv2_mgml.inference.arguments import check_processes
from nnunetv2_mgml.inference.arrays import on_host, prepare_image, prepare_named
from nnunetv2_mgml.inference.case_quality import export_and_sum_up
from nnunetv2_mgml.inference.compiled import BACKENDS, CompiledNetworks, require_openvino
from nnunetv2_mgml.inference.earlier import Earlier
from nnunetv2_mgml.inference.inputs import AUTO, parse_missing
from nnunetv2_mgml.inference.model_check import building, check_checkpoint, check_model_folder, check_supported
from nnunetv2_mgml.inference.planning import (
    Plan,
    check_places,
    output_folder,
    plan_cases,
    refuse_incomplete,
    refuse_without_cases,
)
from nnunetv2_mgml.inference.preprocessing import FailedItem, Item, Job, Model, iterate_items, prepare_job
from nnunetv2_mgml.inference.report import PredictionReport
from nnunetv2_mgml.inference.uncertainty import check_ending
from nnunetv2_mgml.io.files import file_stamp
from nnunetv2_mgml.io.workers import Task, WorkerPool
from nnunetv2_mgml.modalities import Subset, channel_names, subset_name
from nnunetv2_mgml.network.interface import bare, seeing
from nnunetv2_mgml.plans.model_files import read_model_files
from nnunetv2_mgml.upstream.allocator import freed_memory_kept
from nnunetv2_mgml.upstream.checkpoints import loading, trusted
from nnunetv2_mgml.upstream.export import export_case
from nnunetv2_mgml.upstream.registration import add_ext_dir
from nnunetv2_mgml.upstream.sliding_window import network_with_heads

_log = logging.getLogger(__name__)
_WAITING_EXPORTS = 2
"""Predictions that may wait for a free export worker before the next case is predicted."""


Hook = TypeVar("Hook", bound=Callable[..., Any])


def unless_stock(hook: Hook) -> Hook:
    """Decorate a hook that is upstream's own where the predictor was given no ``missing_modalities``."""

    @functools.wraps(hook)
    def chosen(self: MGMLPredictor, *args: Any, **kwargs: Any) -> Any:
        function = hook if self.missing_modalities is not None else getattr(nnUNetPredictor, hook.__name__)
        return function(self, *args, **kwargs)

    return cast(Hook, chosen)


class MGMLPredictor(nnUNetPredictor):  # type: ignore[misc]  # untyped
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
            each and every fold; 0.6 to 0.9 of the time of a patch after that, depending on the processor), equal up to
            rounding. Needs ``missing_modalities``.
        **kwargs: as for ``nnUNetPredictor``.

    Attributes:
        failures: case name -> message of the cases the last call could not predict; the others were predicted.
        report_file: ``mgml_prediction.json`` of the last call that wrote files.
        report_cases: the cases that call was to predict.
        report_done: the cases it left as they were.
        save_uncertainty: maps will be made of what is predicted (`uncertainty`); a model whose files cannot hold them
            is refused.
        checks_input: without ``missing_modalities``, refuse a source in which nnU-Net finds no case instead of doing
            nothing.
        sequential_part: ``(part_id, num_parts)`` for `predict_from_files_sequential`, which upstream does not split.

    Raises:
        ValueError: ``cpu_bfloat16`` or ``openvino`` on another device, or OpenVINO is not installed.
    """

    def __init__(
        self,
        *args: Any,
        missing_modalities: Sequence[str] | str | None = None,
        cpu_bfloat16: bool = False,
        trust_checkpoint: bool = False,
        backend: str = "pytorch",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if cpu_bfloat16 and self.device.type != "cpu":
            raise ValueError(
                f"cpu_bfloat16 is for device cpu, not {self.device.type}; on CUDA nnU-Net uses mixed precision anyway."
            )
        if isinstance(missing_modalities, str):
            missing_modalities = [missing_modalities]
        self.backend = backend
        self._compiled = self._compiler(backend, missing_modalities is None, cpu_bfloat16)
        self._subset: Subset | None = None
        self.missing_modalities = None if missing_modalities is None else list(missing_modalities)
        self.cpu_bfloat16 = cpu_bfloat16
        self.trust_checkpoint = trust_checkpoint
        self.failures: dict[str, str] = {}
        self.checks_input = False
        self.sequential_part = (0, 1)
        self._origin: dict[str, Any] = {}
        self._plan: Plan | None = None
        self._report: PredictionReport | None = None
        self.report_file: Path | None = None
        self.report_cases: list[str] = []
        self.report_done: list[str] = []
        self.save_uncertainty = False

    @property
    def channels(self) -> tuple[str, ...]:
        """The model's ``M`` modality names in channel order."""
        return channel_names(self.dataset_json)

    @property
    def model(self) -> Model:
        """What preprocessing needs to know of the model."""
        return Model(self.plans_manager, self.configuration_manager, self.dataset_json, self.verbose_preprocessing)

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
            "checkpoint_size_and_time_ns": {
                str(fold): file_stamp(Path(model_training_output_dir, f"fold_{fold}", checkpoint_name))
                for fold in folds
            },
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
        if self.save_uncertainty:
            check_ending(self.dataset_json["file_ending"])

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
            ValueError, FileNotFoundError: wrong arguments, found before any work and before anything is written; with
                ``overwrite=False`` also segmentations that are there and were made with other settings.
        """
        source, target = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
        source, target = _as_text(source), _as_text(target)
        previous = self.configuration_manager.previous_stage_name
        if previous is not None and folder_with_segs_from_prev_stage is None:
            raise ValueError(
                f"This model is the second stage of a cascade: give the folder with the predictions of "
                f"{previous} (-prev_stage_predictions)."
            )
        check_places(source, target, folder_with_segs_from_prev_stage)
        if self.missing_modalities is None:
            check_processes(num_processes_preprocessing, num_processes_segmentation_export, num_parts)
            if num_processes_preprocessing == 0:
                return self.predict_from_files_sequential(
                    source, target, save_probabilities, overwrite, folder_with_segs_from_prev_stage
                )
        self.failures = {}
        self._check_input(source)
        if self.missing_modalities is not None:  # upstream writes into the folder before it looks for cases
            arguments = (source, target, folder_with_segs_from_prev_stage, overwrite, part_id, num_parts)
            self._plan = self._make_plan(*arguments, save_probabilities)
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
            self._plan = None
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
        if self.missing_modalities is None:
            check_places(
                list_of_lists_or_source_folder,
                output_folder_or_list_of_truncated_output_files,
                folder_with_segs_from_prev_stage,
            )
            self._check_input(list_of_lists_or_source_folder)
            if isinstance(output_folder_or_list_of_truncated_output_files, (str, Path)):  # upstream's other call does
                os.makedirs(output_folder_or_list_of_truncated_output_files, exist_ok=True)
            stock: list[Any] | None = super().predict_from_files_sequential(
                list_of_lists_or_source_folder,
                output_folder_or_list_of_truncated_output_files,
                save_probabilities,
                overwrite,
                folder_with_segs_from_prev_stage,
            )
            return stock
        files = (list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files)
        part_id, num_parts = self.sequential_part
        return self.predict_from_files(
            *files, save_probabilities, overwrite, 0, 0, folder_with_segs_from_prev_stage, num_parts, part_id
        )

    def _check_input(self, source: Any) -> None:
        if self.checks_input and self.missing_modalities is None and isinstance(source, (str, Path)):
            refuse_without_cases(source, self.dataset_json["file_ending"], self.channels)

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
        """As upstream, with a `Case` in place of each list of files; stock prediction has no case that lacks one."""
        if self.missing_modalities is None:
            stock: tuple[list[Any], list[str | None] | None, list[str | None]] = super()._manage_input_and_output_lists(
                list_of_lists_or_source_folder,
                output_folder_or_list_of_truncated_output_files,
                folder_with_segs_from_prev_stage,
                overwrite,
                part_id,
                num_parts,
                save_probabilities,
            )
            refuse_incomplete(stock[0], self.dataset_json["file_ending"], self.channels)
            return stock
        source, target = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
        arguments = (source, target, folder_with_segs_from_prev_stage, overwrite, part_id, num_parts)
        plan = self._plan or self._make_plan(*arguments, save_probabilities)
        folder = output_folder(target)
        if folder is not None:
            self._report = PredictionReport(
                folder, self._about, self.channels, keep=not overwrite, part_id=part_id, num_parts=num_parts
            )
            self.report_file = self._report.path
            self.report_cases, self.report_done = ([planned.case.name for planned in part] for part in plan)
            self._report.begin(self.report_cases, self.report_done)
        _log.info("%d cases to predict, %d are there already", len(plan.todo), len(plan.done))
        return (
            [planned.case for planned in plan.todo],
            [planned.ofile for planned in plan.todo],
            [planned.previous_stage for planned in plan.todo],
        )

    def _make_plan(
        self,
        source: Any,
        target: Any,
        previous_stage: str | None,
        overwrite: bool,
        part_id: int,
        num_parts: int,
        save_probabilities: bool,
    ) -> Plan:
        """Work out what to predict; raises as `plan_cases` and `Earlier.refuse_other_settings` do."""
        earlier = Earlier(None if overwrite else output_folder(target))
        plan = plan_cases(
            source,
            target,
            previous_stage,
            self.dataset_json["file_ending"],
            self.channels,
            overwrite=overwrite,
            part_id=part_id,
            num_parts=num_parts,
            save_probabilities=save_probabilities,
            again=earlier.unfinished,
        )
        todo, done = ({planned.case.name for planned in part} for part in plan)
        # a part reports on its own cases, a whole run also on those that are not among its inputs
        kept = done if num_parts > 1 else earlier.cases.keys() - todo
        earlier.refuse_other_settings(self._about, self.channels, kept)
        return plan

    @property
    def _about(self) -> dict[str, Any]:
        """What a report says of the model and its settings."""
        return {
            **self._origin,
            "trainer": self.trainer_name,
            "missing_modalities": self.missing_modalities,
            "tile_step_size": self.tile_step_size,
            "use_mirroring": self.use_mirroring,
            "device": str(self.device),
            "cpu_bfloat16": self.cpu_bfloat16,
            "backend": self.backend,
        }

    @unless_stock
    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[Any],
        seg_from_prev_stage_files: list[str | None],
        output_filenames_truncated: list[str | None] | None,
        num_processes: int,
    ) -> Iterator[Item | FailedItem]:
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
    @unless_stock
    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: Any,
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: Any,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
    ) -> Iterator[Item | FailedItem]:
        """As upstream. An image is ``(M, z, y, x)``, or a tuple of ``M`` volumes with None for a missing one.

        Tensors are taken as arrays. With output files properties need more than the spacing (`geometry`).
        """
        arguments = (
            image_or_list_of_images,
            segs_from_prev_stage_or_list_of_segs_from_prev_stage,
            properties_or_list_of_properties,
            truncated_ofname,
        )
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
                        prepare_image,
                        name,
                        on_host(image),
                        properties,
                        on_host(previous),
                        self.missing_modalities,
                        self.model,
                        ofile,
                    ),
                )
            )
        return iterate_items(jobs, num_processes)

    @unless_stock
    def predict_single_npy_array(
        self,
        input_image: Any,
        image_properties: dict[str, Any],
        segmentation_previous_stage: NDArray[Any] | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> Any:
        """As upstream. The image is ``(M, z, y, x)``, or a tuple of ``M`` volumes with None for a missing one.

        Tensors are taken as arrays. With an output file properties need more than the spacing (`geometry`).

        Raises:
            ValueError: no spacing.
            CaseError: the image cannot be predicted, or not be written.
        """
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
        images: Mapping[str, ArrayLike | str | Path | None],
        *,
        spacing: Sequence[float] | None = None,
        properties: dict[str, Any] | None = None,
        previous_stage: ArrayLike | str | Path | None = None,
        return_probabilities: bool = False,
    ) -> Any:
        """Predict one case given by modality names; names left out (or None) are missing.

        Args:
            images: name -> path, or ``(z, y, x)`` array as the model's reader returns it, or a tensor of any device.
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
            properties = {"spacing": spacing}
        check_supported(self.network, self.trainer_name)
        item = prepare_named("given", images, properties, previous_stage, self.missing_modalities or [AUTO], self.model)
        function, arguments = self._export_call(item, self._logits(item), return_probabilities)
        return function(*arguments)

    # --- from a preprocessed case to its segmentation -----------------------------------------------------------------
    def _compiler(self, backend: str, no_subsets: bool, bfloat16: bool) -> CompiledNetworks | None:
        if backend not in BACKENDS:
            raise ValueError(f"Unknown backend '{backend}'. Allowed: {', '.join(BACKENDS)}.")
        if backend == "pytorch":
            return None
        if self.device.type != "cpu":
            raise ValueError(f"The backend openvino is for device cpu, not {self.device.type}.")
        if no_subsets:
            raise ValueError("The backend openvino needs missing_modalities; 'auto' goes by the files that exist.")
        require_openvino()
        return CompiledNetworks(bfloat16)

    @unless_stock
    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Item | FailedItem],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """As upstream for items of `preprocessing`; a `FailedItem` goes to `failures`."""
        results: list[Any] = []
        waiting: deque[tuple[int, str, Task]] = deque()
        outputs: dict[str, str] = {}
        at_most = num_processes_segmentation_export and num_processes_segmentation_export + _WAITING_EXPORTS
        try:
            with WorkerPool(num_processes_segmentation_export) as pool:
                for item in data_iterator:
                    task = self._predict_item(item, save_probabilities, pool)
                    if task is not None:
                        waiting.append((len(results), item.case, task))
                        if isinstance(item, Item) and item.ofile is not None:
                            outputs[item.case] = item.ofile + self.dataset_json["file_ending"]
                    results.append(None)
                    while len(waiting) > at_most:
                        self._finish_first(results, pool, waiting)
                while waiting:
                    self._finish_first(results, pool, waiting)
            self._refuse_lost(outputs)
        finally:
            for _, case, task in waiting:  # interrupted: what the workers still finished is complete
                if self._report is not None and task.succeeded():
                    self._report.finish(case, summary=task.future.result() if self._sums_up else None)
            if isinstance(data_iterator, Iterator) and hasattr(data_iterator, "close"):
                data_iterator.close()
            compute_gaussian.cache_clear()
            empty_cache(self.device)
        return results

    def _predict_item(self, item: Item | FailedItem, save_probabilities: bool, pool: WorkerPool) -> Task | None:
        if isinstance(item, FailedItem):
            self._fail(item.case, item.error)
            return None
        present = subset_name(item.available, self.channels)
        _log.info("Predicting %s from %s", item.case, present)
        if self._report is not None:
            self._report.add_item(item)
        try:
            logits = self._logits(item)
        except Exception as error:  # out of memory, say: the next case may be smaller
            _log.exception("Prediction of case %s failed", item.case)
            self._fail(item.case, f"Case {item.case}: prediction failed ({type(error).__name__}: {error}).")
        else:
            function, arguments = self._export_call(item, logits, save_probabilities)
            return pool.submit(function, *arguments)
        empty_cache(self.device)  # only now is the failed attempt's memory free
        return None

    def _finish_first(self, results: list[Any], pool: WorkerPool, waiting: deque[tuple[int, str, Task]]) -> None:
        """Wait for the export of a case; it leaves the queue afterwards, so that an interruption does not lose it."""
        self._finish(results, pool, *waiting[0])
        waiting.popleft()

    def _finish(self, results: list[Any], pool: WorkerPool, index: int, case: str, task: Task) -> None:
        summary = None
        try:
            results[index] = pool.result(task)
            if self._sums_up:
                summary, results[index] = results[index], None
        except Exception as error:  # the disk may be full, or the worker killed: the others are still exported
            _log.exception("Export of case %s failed", case)
            self._fail(case, f"Case {case}: export failed ({type(error).__name__}: {error}).")
            return
        if self._report is not None:
            self._report.finish(case, summary=summary)

    @property
    def _sums_up(self) -> bool:
        """Whether exports also return what the probabilities say: the model's report can make something of it."""
        return self._report is not None and self._report.estimates_quality

    def _refuse_lost(self, outputs: Mapping[str, str]) -> None:
        """Count the cases as failed whose files are gone: somebody has removed the output folder under way."""
        for case, file in outputs.items():
            if case not in self.failures and not os.path.isfile(file):
                self._fail(case, f"Case {case}: {file} was written, but is gone; predict it again.")

    def _fail(self, case: str, message: str) -> None:
        _log.error("%s", message)
        self.failures[case] = message
        if self._report is not None:
            self._report.finish(case, message)

    def _logits(self, item: Item) -> NDArray[Any]:
        """Run the sliding window; returns ``(heads, z, y, x)`` float16 on the preprocessed grid."""
        try:
            with seeing(self.network, item.available):
                self._subset = tuple(item.available)
                return self.predict_logits_from_preprocessed_data(torch.from_numpy(item.data)).cpu().numpy()
        finally:
            self._subset = None

    def _export_call(self, item: Item, logits: NDArray[Any], probabilities: bool) -> tuple[Any, tuple[Any, ...]]:
        """Return a picklable function and its arguments: write the files, or return the label map."""
        if item.ofile is not None:
            arguments = (
                logits,
                item.properties,
                self.configuration_manager,
                self.plans_manager,
                self.dataset_json,
                item.ofile,
                probabilities,
            )
            return (export_and_sum_up, (False, *arguments)) if self._sums_up else (export_case, arguments)
        return convert_predicted_logits_to_segmentation_with_correct_shape, (
            logits,
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            item.properties,
            probabilities,
        )

    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """As upstream on ``(M + P, z, y, x)`` float32; afterwards there are as many threads as before."""
        threads = torch.get_num_threads()
        try:
            with freed_memory_kept() if self.device.type == "cpu" else nullcontext():
                logits: torch.Tensor = super().predict_logits_from_preprocessed_data(data)
                return logits
        finally:
            torch.set_num_threads(threads)

    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """As upstream on ``(M + P, z, y, x)`` float32, in bfloat16 or by another backend where that was asked for."""
        with self._precision() if self._compiled is None or self._subset is None else self._by_openvino(input_image):
            logits: torch.Tensor = super().predict_sliding_window_return_logits(input_image)
            return logits

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if not self.cpu_bfloat16:
            yield
            return
        # upstream sums mirrored predictions in the network's own type; bfloat16 has 8 bits only
        hook = self.network.register_forward_hook(lambda module, inputs, output: output.float())
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                yield
        finally:
            hook.remove()

    @contextmanager
    def _by_openvino(self, image: torch.Tensor) -> Iterator[None]:
        """Let the sliding window call the compiled network of the case's subset."""
        assert self._compiled is not None
        assert self._subset is not None
        example = torch.zeros(1, len(image), *self.configuration_manager.patch_size)
        network = self._compiled.of(bare(self.network), self._subset, example)
        with network_with_heads(self, network, self.label_manager.num_segmentation_heads):
            yield


def _as_text(paths: Any) -> Any:
    """Replace Path objects, also in lists: upstream looks for ``str`` and writes its arguments as JSON."""
    if isinstance(paths, (list, tuple)):
        return [_as_text(path) for path in paths]
    return str(paths) if isinstance(paths, Path) else paths
