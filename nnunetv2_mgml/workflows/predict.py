"""What our flags of nnU-Net's predict commands ask for: the predictor, and what is made of its predictions.

nnU-Net's own function reads the arguments, builds the predictor and runs it; from Python use `MGMLPredictor`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunetv2_mgml.inference import uncertainty
from nnunetv2_mgml.inference.arguments import (
    check_device,
    check_folds,
    check_part,
    check_processes,
    check_step_size,
)
from nnunetv2_mgml.inference.compiled import BACKENDS
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.io.cpus import usable_cpus


@dataclass(frozen=True, kw_only=True)
class PredictionRequest:
    """What one command asks for, our flags and what they have to do with of nnU-Net's."""

    missing_modalities: Sequence[str] | None = None
    """As for `MGMLPredictor`; None: nnU-Net's own prediction."""
    cpu_bfloat16: bool = False
    backend: str = BACKENDS[0]
    trust_checkpoint: bool = False
    preview: bool = False
    """One PNG a case."""
    save_uncertainty: bool = False
    """One map a case; nnU-Net has to save the probabilities it is made from."""
    keep_probabilities: bool = True
    """Leave these probabilities where they are."""
    device: str = "cuda"
    folds: Sequence[int | str] = (0, 1, 2, 3, 4)
    step_size: float = 0.5
    part: tuple[int, int] = (0, 1)
    """``(part_id, num_parts)``, which nnU-Net forgets where it runs without worker processes."""
    processes: tuple[int, int] | None = None
    """``-npp`` and ``-nps``; None: not known."""
    checks_input: bool = False
    """Refuse an input in which nnU-Net's own prediction finds no case, where that is what was asked for."""

    @property
    def uses_our_flags(self) -> bool:
        """Whether this is more than nnU-Net does; trust alone is not."""
        return bool(
            self.missing_modalities is not None
            or self.cpu_bfloat16
            or self.backend != BACKENDS[0]
            or self.preview
            or self.save_uncertainty
        )


def check_request(request: PredictionRequest) -> None:
    """Raise where a request cannot be, before any model is loaded.

    Raises:
        ValueError: a flag without ``--missing_modalities``, a fold, a step size, a part or a number of processes that
            cannot be.
    """
    asked = {
        "preview": request.preview,
        "save_uncertainty": request.save_uncertainty,
        "backend": request.backend != BACKENDS[0],
    }
    for option, used in asked.items():
        if used and request.missing_modalities is None:
            raise ValueError(f"--{option} needs --missing_modalities; 'auto' goes by the files that exist.")
    check_folds(request.folds)
    check_step_size(request.step_size)
    check_part(*request.part)
    if not request.uses_our_flags and request.processes is not None:
        check_processes(*request.processes, request.part[1])


def build_predictor(request: PredictionRequest, *args: Any, **kwargs: Any) -> MGMLPredictor:
    """Build the predictor of a request; of one without our flags, it predicts as nnU-Net's but reads files as data.

    Args:
        request: what was asked for.
        *args: as for ``nnUNetPredictor``.
        **kwargs: as for ``nnUNetPredictor``.

    Raises:
        ValueError: a device that is not there, or that cannot do what was asked for.
    """
    predictor = MGMLPredictor(
        *args,
        missing_modalities=request.missing_modalities,
        cpu_bfloat16=request.cpu_bfloat16,
        backend=request.backend,
        trust_checkpoint=request.trust_checkpoint,
        **kwargs,
    )
    check_device(request.device)
    if request.uses_our_flags and request.device == "cpu":  # nnU-Net starts a thread for every CPU of the machine
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    predictor.sequential_part = request.part
    predictor.save_uncertainty = request.save_uncertainty
    predictor.checks_input = request.checks_input
    return predictor


@dataclass(frozen=True)
class Additions:
    """What lies beside the segmentations."""

    previews: Path | None = None
    """Folder of the previews, where they were asked for and there are any."""
    num_previews: int = 0
    """Of the cases of this call."""
    uncertainty: Path | None = None
    """Folder of the maps, where they were asked for and there are any."""


def write_additions(request: PredictionRequest, predictor: MGMLPredictor) -> Additions:
    """Write what was asked for of the cases that a predictor has just predicted.

    Of cases that it left as they were (``--continue_prediction``), what is absent or older than their segmentation is
    written as well; their probabilities stay. A map that cannot be written is added to the predictor's ``failures``; a
    preview costs only itself.
    """
    report = predictor.report_file
    if report is None:
        return Additions()
    folder, additions = report.parent, Additions()
    ending = predictor.dataset_json["file_ending"]
    if request.preview:
        from nnunetv2_mgml.presentation.preview import FOLDER, without_preview, write_previews  # slow: matplotlib

        cases = [*predictor.report_cases, *without_preview(folder, predictor.report_done, ending)]
        write_previews(report, predictor.dataset_json, cases)
        shown = [(folder / FOLDER / f"{case}.png").is_file() for case in predictor.report_cases + predictor.report_done]
        additions = dataclasses.replace(additions, previews=_filled(folder / FOLDER), num_previews=sum(shown))
    if request.save_uncertainty:
        write_maps = functools.partial(
            uncertainty.write_maps,
            folder,
            ending=ending,
            regions=predictor.label_manager.has_regions,
            reader=predictor.plans_manager.image_reader_writer_class(),
        )
        predicted = [case for case in predictor.report_cases if case not in predictor.failures]
        absent = uncertainty.without_map(folder, predictor.report_done, ending)
        predictor.failures |= write_maps(predicted, keep_probabilities=request.keep_probabilities)
        predictor.failures |= write_maps(absent, keep_probabilities=True)
        additions = dataclasses.replace(additions, uncertainty=_filled(folder / uncertainty.FOLDER))
    return additions


def _filled(folder: Path) -> Path | None:
    return folder if folder.is_dir() and any(folder.iterdir()) else None
