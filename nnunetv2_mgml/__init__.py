"""nnunetv2_mgml: an nnU-Net v2 plugin for segmentation when imaging modalities are missing.

The names in ``__all__`` are the public ones. Each is imported when it is first used, so that importing the package
imports neither torch nor nnU-Net, and costs next to nothing.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # type checkers know the name; importing typing for it would cost most of our start-up
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from nnunetv2_mgml.dataset_conversion.back import convert_back
    from nnunetv2_mgml.dataset_conversion.convert import convert_brats
    from nnunetv2_mgml.dataset_conversion.resplit import split_dataset
    from nnunetv2_mgml.inference.predictor import MGMLPredictor
    from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec
    from nnunetv2_mgml.network.fusion.base import register as register_fusion
    from nnunetv2_mgml.network.interface import Needs
    from nnunetv2_mgml.objective import Options
    from nnunetv2_mgml.objective.base import Term, TermSpec, TermValue
    from nnunetv2_mgml.objective.base import register as register_term
    from nnunetv2_mgml.objective.step import Step
    from nnunetv2_mgml.phantom.files import write_phantoms
    from nnunetv2_mgml.plans.options import OptionGroup, option
    from nnunetv2_mgml.presentation.figures.qualitative import qualitative_sheet
    from nnunetv2_mgml.presentation.figures.slices import read_axial, telling_slice
    from nnunetv2_mgml.presentation.figures.style import save as save_figure
    from nnunetv2_mgml.scoring.metrics.base import Metric
    from nnunetv2_mgml.scoring.metrics.base import register as register_metric
    from nnunetv2_mgml.scoring.results import Evaluation, load_evaluation
    from nnunetv2_mgml.scoring.statistics import compare_evaluations
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML
    from nnunetv2_mgml.workflows.check import CheckRequest, check_dataset
    from nnunetv2_mgml.workflows.compare import ComparisonRequest, compare_folders
    from nnunetv2_mgml.workflows.evaluate import (
        ModelRequest,
        PredictionsRequest,
        evaluate_model,
        evaluate_predictions,
    )
    from nnunetv2_mgml.workflows.find_best import BestRequest, find_best
    from nnunetv2_mgml.workflows.plan import PlanRequest, write_plans
    from nnunetv2_mgml.workflows.report import InternalsRequest, ReportRequest, make_report

__version__ = "0.2.0"

__all__ = [
    "BestRequest",
    "CheckRequest",
    "ComparisonRequest",
    "Evaluation",
    "FusedScale",
    "FusionDesign",
    "FusionSpec",
    "InternalsRequest",
    "MGMLPredictor",
    "Metric",
    "ModelRequest",
    "Needs",
    "OptionGroup",
    "Options",
    "PlanRequest",
    "PredictionsRequest",
    "ReportRequest",
    "Step",
    "Term",
    "TermSpec",
    "TermValue",
    "check_dataset",
    "compare_evaluations",
    "compare_folders",
    "convert_back",
    "convert_brats",
    "evaluate_model",
    "evaluate_predictions",
    "find_best",
    "load_evaluation",
    "make_report",
    "nnUNetTrainerMGML",
    "option",
    "qualitative_sheet",
    "read_axial",
    "register_fusion",
    "register_metric",
    "register_term",
    "save_figure",
    "split_dataset",
    "telling_slice",
    "write_phantoms",
    "write_plans",
]

_PLACES = {
    "BestRequest": "workflows.find_best",
    "CheckRequest": "workflows.check",
    "ComparisonRequest": "workflows.compare",
    "Evaluation": "scoring.results",
    "FusedScale": "network.fusion.base",
    "FusionDesign": "network.fusion.base",
    "FusionSpec": "network.fusion.base",
    "InternalsRequest": "workflows.report",
    "MGMLPredictor": "inference.predictor",
    "Metric": "scoring.metrics.base",
    "ModelRequest": "workflows.evaluate",
    "Needs": "network.interface",
    "OptionGroup": "plans.options",
    "Options": "objective",
    "PlanRequest": "workflows.plan",
    "PredictionsRequest": "workflows.evaluate",
    "ReportRequest": "workflows.report",
    "Step": "objective.step",
    "Term": "objective.base",
    "TermSpec": "objective.base",
    "TermValue": "objective.base",
    "check_dataset": "workflows.check",
    "compare_evaluations": "scoring.statistics",
    "compare_folders": "workflows.compare",
    "convert_back": "dataset_conversion.back",
    "convert_brats": "dataset_conversion.convert",
    "evaluate_model": "workflows.evaluate",
    "evaluate_predictions": "workflows.evaluate",
    "find_best": "workflows.find_best",
    "load_evaluation": "scoring.results",
    "make_report": "workflows.report",
    "nnUNetTrainerMGML": "training.trainer",
    "option": "plans.options",
    "qualitative_sheet": "presentation.figures.qualitative",
    "read_axial": "presentation.figures.slices",
    "register_fusion": "network.fusion.base:register",
    "register_metric": "scoring.metrics.base:register",
    "register_term": "objective.base:register",
    "save_figure": "presentation.figures.style:save",
    "split_dataset": "dataset_conversion.resplit",
    "telling_slice": "presentation.figures.slices",
    "write_phantoms": "phantom.files",
    "write_plans": "workflows.plan",
}
"""Public name -> the module that has it, and behind a colon what it is called there."""


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _PLACES[name].partition(":")
    value: object = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _OldPaths:
    """Asks `nnunetv2_mgml._moved` for modules of this package that every other finder has missed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of a module that has moved, else None; see `importlib.abc.MetaPathFinder`."""
        if not name.startswith(f"{__name__}.") or name == f"{__name__}._moved":
            return None
        try:
            from nnunetv2_mgml import _moved
        except ImportError:  # somebody is removing the package
            return None
        return _moved.find_spec(name)


sys.meta_path.append(_OldPaths)
