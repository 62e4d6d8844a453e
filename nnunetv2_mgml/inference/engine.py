"""The part of `MGMLPredictor` that meets the network: one preprocessed case in, one written segmentation out."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from numpy.typing import NDArray

from nnunetv2_mgml.inference.case_quality import export_and_sum_up
from nnunetv2_mgml.inference.compiled import BACKENDS, CompiledNetworks, require_openvino
from nnunetv2_mgml.inference.preprocessing import Item, Model
from nnunetv2_mgml.inference.report import PredictionReport
from nnunetv2_mgml.io.workers import Task, WorkerPool
from nnunetv2_mgml.modalities import Subset, channel_names, subset_name
from nnunetv2_mgml.network.interface import bare, seeing
from nnunetv2_mgml.upstream.export import export_case
from nnunetv2_mgml.upstream.sliding_window import network_with_heads

_log = logging.getLogger(__name__)
_WAITING_EXPORTS = 2
"""Predictions that may wait for a free export worker before the next case is predicted."""


class SubsetEngine(nnUNetPredictor):  # type: ignore[misc]  # untyped
    """Base of `MGMLPredictor`, which documents the arguments."""

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
        self.sequential_part = (0, 1)
        self._origin: dict[str, Any] = {}
        self._report: PredictionReport | None = None
        self.report_file: Path | None = None
        self.report_cases: list[str] = []

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

    @property
    def channels(self) -> tuple[str, ...]:
        """The model's ``M`` modality names in channel order."""
        return channel_names(self.dataset_json)

    @property
    def model(self) -> Model:
        """What preprocessing needs to know of the model."""
        return Model(self.plans_manager, self.configuration_manager, self.dataset_json, self.verbose_preprocessing)

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Item],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """As upstream for items of `preprocessing`; items with ``error`` go to `failures`."""
        if self.missing_modalities is None:
            plain: list[Any] = super().predict_from_data_iterator(
                data_iterator, save_probabilities, num_processes_segmentation_export
            )
            return plain
        results: list[Any] = []
        waiting: deque[tuple[int, str, Task]] = deque()
        outputs: dict[str, str] = {}
        at_most = num_processes_segmentation_export and num_processes_segmentation_export + _WAITING_EXPORTS
        try:
            with WorkerPool(num_processes_segmentation_export) as pool:
                for item in data_iterator:
                    task = self._predict_item(item, save_probabilities, pool)
                    if task is not None:
                        waiting.append((len(results), item["case"], task))
                        if item["ofile"] is not None:
                            outputs[item["case"]] = item["ofile"] + self.dataset_json["file_ending"]
                    results.append(None)
                    while len(waiting) > at_most:
                        self._finish(results, pool, *waiting.popleft())
                while waiting:
                    self._finish(results, pool, *waiting.popleft())
            self._refuse_lost(outputs)
        finally:
            for _, case, task in waiting:  # interrupted: what the workers still finished is complete
                if self._report is not None and task.succeeded():
                    self._report.finish(case)
            if isinstance(data_iterator, Iterator) and hasattr(data_iterator, "close"):
                data_iterator.close()
            compute_gaussian.cache_clear()
            empty_cache(self.device)
        return results

    def _predict_item(self, item: Item, save_probabilities: bool, pool: WorkerPool) -> Task | None:
        if "error" in item:
            self._fail(item["case"], item["error"])
            return None
        present = subset_name(item["availability"], self.channels)
        _log.info("Predicting %s from %s", item["case"], present)
        if self._report is not None:
            self._report.add_item(item)
        try:
            logits = self._logits(item)
        except Exception as error:  # out of memory, say: the next case may be smaller
            _log.exception("Prediction of case %s failed", item["case"])
            self._fail(item["case"], f"Case {item['case']}: prediction failed ({type(error).__name__}: {error}).")
        else:
            function, arguments = self._export_call(item, logits, save_probabilities)
            return pool.submit(function, *arguments)
        empty_cache(self.device)  # only now is the failed attempt's memory free
        return None

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
        threads = torch.get_num_threads()
        try:
            with seeing(self.network, item["availability"]):
                self._subset = tuple(item["availability"])
                logits: torch.Tensor = self.predict_logits_from_preprocessed_data(torch.from_numpy(item["data"]))
                return logits.cpu().numpy()
        finally:
            self._subset = None
            torch.set_num_threads(threads)

    def _export_call(self, item: Item, logits: NDArray[Any], probabilities: bool) -> tuple[Any, tuple[Any, ...]]:
        """Return a picklable function and its arguments: write the files, or return the label map."""
        if item["ofile"] is not None:
            arguments = (
                logits,
                item["data_properties"],
                self.configuration_manager,
                self.plans_manager,
                self.dataset_json,
                item["ofile"],
                probabilities,
            )
            return (export_and_sum_up, (False, *arguments)) if self._sums_up else (export_case, arguments)
        return convert_predicted_logits_to_segmentation_with_correct_shape, (
            logits,
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            item["data_properties"],
            probabilities,
        )

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
