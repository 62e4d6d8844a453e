"""Paths of version 0.1.0 that have moved: each still works until 0.3, with a DeprecationWarning naming the new place.

The package's finder asks `find_spec` only for modules of this package that do not exist, so nothing here is imported,
and no time spent, unless an old path is used. A module that still exists but gave some of its names away forwards
those with one line at its end, ``if not TYPE_CHECKING: __getattr__ = forward(__name__)``.

All names below are relative to ``nnunetv2_mgml.``. To move or rename something public, add a line here;
``tests/project/test_moved.py`` checks every public name of 0.1.0.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "nnunetv2_mgml"
UNTIL = "0.3"

MOVED: dict[str, tuple[str, ...]] = {
    "cli": ("commands.main",),
    "config": ("plans.options", "objective.flat"),
    "dataset_conversion.checks": ("dataset_conversion.case_writer",),
    "dataset_conversion.command": ("commands.convert",),
    "dataset_conversion.parallel": ("io.workers",),
    "dataset_conversion.paths": ("plans.folders",),
    "demo": ("commands.demo", "workflows.demo"),
    "evaluation": ("scoring",),
    "evaluation.command": ("commands.evaluate", "presentation.tables"),
    "evaluation.compare_command": ("commands.compare", "presentation.tables"),
    "evaluation.demo_figure": ("presentation.demo_figure",),
    "evaluation.evaluate": ("workflows.before_0_2",),
    "evaluation.figure_files": ("presentation.figure_files",),
    "evaluation.figures": ("presentation.figures",),
    "evaluation.figures.differences": ("presentation.figures.differences",),
    "evaluation.figures.internals": ("presentation.figures.internals",),
    "evaluation.figures.qualitative": ("presentation.figures.qualitative",),
    "evaluation.figures.shapley": ("presentation.figures.shapley",),
    "evaluation.figures.slices": ("presentation.figures.slices",),
    "evaluation.figures.style": ("presentation.figures.style",),
    "evaluation.figures.subsets": ("presentation.figures.subsets",),
    "evaluation.figures.training": ("presentation.figures.training",),
    "evaluation.files": ("io.volumes",),
    "evaluation.internals": ("presentation.internals",),
    "evaluation.metrics": ("scoring.metrics",),
    "evaluation.metrics.base": ("scoring.metrics.base",),
    "evaluation.metrics.lesionwise": ("scoring.metrics.lesionwise",),
    "evaluation.metrics.overlap": ("scoring.metrics.overlap",),
    "evaluation.metrics.surface": ("scoring.metrics.surface",),
    "evaluation.metrics.volume": ("scoring.metrics.volume",),
    "evaluation.output": ("scoring.output", "io.files"),
    "evaluation.policy": ("scoring.policy",),
    "evaluation.progress": ("io.progress",),
    "evaluation.regions": ("scoring.regions",),
    "evaluation.report": ("presentation.report",),
    "evaluation.report.cases": ("presentation.report.cases",),
    "evaluation.report.charts": ("presentation.report.charts",),
    "evaluation.report.content": ("presentation.report.content",),
    "evaluation.report.inside": ("presentation.report.inside",),
    "evaluation.report.page": ("presentation.report.page",),
    "evaluation.report.sheets": ("presentation.report.sheets",),
    "evaluation.report.sprites": ("presentation.report.sprites",),
    "evaluation.report_command": ("commands.report", "workflows.report"),
    "evaluation.results": ("scoring.results", "scoring.info"),
    "evaluation.scoring": ("scoring.cases",),
    "evaluation.shapley": ("scoring.shapley",),
    "evaluation.sources": ("scoring.sources",),
    "evaluation.statistics": ("scoring.statistics",),
    "evaluation.subset_groups": ("inference.subsets.groups",),
    "evaluation.subset_predictor": ("inference.subsets.predictor",),
    "evaluation.tables": ("presentation.tables", "scoring.results"),
    "files": ("io.files",),
    "inference.engine": ("inference.predictor",),
    "inference.export": ("upstream.export",),
    "inference.grid": ("io.grid",),
    "inference.predict": ("commands.predict",),
    "inference.workers": ("io.workers",),
    "info": ("workflows.before_0_2", "workflows.installation", "commands.info"),
    "losses": ("objective", "objective.meta_network"),
    "losses.adaptive_fusion": ("objective.adaptive_fusion",),
    "losses.consistency": ("objective.consistency",),
    "losses.distillation": ("objective.distillation",),
    "losses.meta_network": ("objective.meta_network", "objective.published.fusion"),
    "losses.readings": ("objective.published.fusion", "objective.published.paper", "objective.published.reference"),
    "losses.rebalancing": ("objective.rebalancing",),
    "losses.segmentation": ("objective.segmentation",),
    "losses.tensors": ("objective.tensors",),
    "losses.voxel_masking": ("objective.voxel_masking",),
    "network.outputs": ("network.interface",),
    "planning": ("workflows.before_0_2", "workflows.plan", "commands.plan"),
    "registration": ("upstream.registration",),
    "subset_report": ("scoring.subset_report", "inference.subset_quality"),
    "topology": ("plans.topology",),
    "training.augmentation": ("upstream.blur",),
    "training.base": ("upstream.validation_cases",),
    "training.determinism": ("training.repetition",),
    "training.published_designs": ("training.variants",),
    "training.rebalancing": ("objective.balance",),
    "training.subset_validation": ("training.validation",),
    "training.training_log": ("training.epoch_log",),
}
"""Module of 0.1.0 -> where its names are now, searched in this order."""

RENAMED: dict[str, str] = {
    "dataset_conversion.checks.GEOMETRY_TOLERANCE": "io.grid.GRID_TOLERANCE",
    "dataset_conversion.checks.geometry_difference": "io.grid.image_difference",
    "dataset_conversion.checks.read_volume": "io.volumes.read_image",
    "inference.engine.SubsetEngine": "inference.predictor.MGMLPredictor",
    "inference.model_check.bare": "network.interface.bare",
    "losses.consistency.better": "objective.consistency.gives_truth_more",
    "training.published_designs": "training.variants",
    "training.trainer.CHECKPOINT_KEY": "training.checkpoint.CHECKPOINT_KEY",
    "network.fusion.base.beside": "network.fusion.base.expand_mask",
    "network.fusion.base.masked": "network.fusion.base.float_mask",
    "network.encoders.scaled_widths": "plans.topology.scaled_widths",
    "network.multi_encoder_unet.in_band_mask": "network.subset_module.in_band_mask",
    "network.fusion.sfusion.ScoreTransformer": "network.fusion.sfusion.InterpolatedScores",
    "evaluation.report.cases.ImageSources": "scoring.sources.EvaluationFiles",
    "evaluation.report.cases.stored_sources": "scoring.sources.find_files",
}
"""Name of 0.1.0 (``module.name``) that is called otherwise now -> its new ``module.name``."""

_TRAINER_TO_SUBCLASS = (
    "Subclass nnUNetTrainerMGML, or nnUNetTrainerModalityDropout for nnU-Net's own network, both in "
    "nnunetv2_mgml.training."
)
_OBJECTIVE = "Build an Objective from a TermSpec, both in nnunetv2_mgml.objective."
_META_NETWORK = "It belongs to the term SoftLabel in nnunetv2_mgml.objective.terms.soft_label."
GONE: dict[str, str] = {
    "inference.complete": "nnunetv2_mgml.io.volumes.check_file looks at more than completeness, and raises one error.",
    "losses.LossTerms": _OBJECTIVE,
    "losses.MGMLLoss": _OBJECTIVE,
    "losses.build_meta_network": _META_NETWORK,
    "losses.meta_network.build_meta_network": _META_NETWORK,
    "losses.total": _OBJECTIVE,
    "evaluation.command.options_from": "Make a nnunetv2_mgml.PredictionsRequest or ModelRequest.",
    "evaluation.compare_command.named_evaluations": "Call nnunetv2_mgml.compare_folders with a ComparisonRequest.",
    "evaluation.evaluate.finish": "Call nnunetv2_mgml.presentation.outputs.write_evaluation.",
    "evaluation.model_command": "Call nnunetv2_mgml.evaluate_model with a ModelRequest.",
    "evaluation.model_evaluation": "Call nnunetv2_mgml.evaluate_model with a ModelRequest.",
    "evaluation.output.drop_outdated": "It is in nnunetv2_mgml.inference.subsets.label_maps and takes the folder of "
    "label maps.",
    "evaluation.report_command.LOG_NAME": "The training log is called mgml_training_log.csv.",
    "evaluation.report_command.MEGABYTE": "It is 1000000 bytes.",
    "evaluation.report_command.find_sources": "Call nnunetv2_mgml.scoring.sources.find_files.",
    "evaluation.report_command.logger": "Call logging.getLogger.",
    "evaluation.sources.logger": "Call logging.getLogger.",
    "evaluation.sources.parse_prediction_folders": "Call nnunetv2_mgml.scoring.sources.prediction_folders.",
    "info.summary_text": "nnunetv2_mgml.workflows.installation.find_installation returns what it took.",
    "planning.PRESETS": "nnunetv2_mgml.plans.presets.preset(name) returns what a preset sets.",
    "training.MissingModalityTrainer": _TRAINER_TO_SUBCLASS,
    "training.augmentation.AugmentationTrainer": _TRAINER_TO_SUBCLASS,
    "training.base.MissingModalityTrainer": _TRAINER_TO_SUBCLASS,
}
"""Module or name of 0.1.0 that has no successor of the same meaning -> what to use instead, a sentence."""


def find_spec(fullname: str) -> ModuleSpec | None:
    """Return the spec of a forwarding module where ``fullname`` is an old path, else None."""
    old = fullname.removeprefix(f"{PACKAGE}.")
    if old not in MOVED and old not in GONE:
        return None
    is_package = any(name.startswith(f"{old}.") for name in MOVED)
    return ModuleSpec(fullname, _Loader(), is_package=is_package)


class _Loader(Loader):
    """Makes a module that holds nothing and forwards every name."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to make an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"Moved; importing names from here works until {UNTIL}."
        vars(module)["__getattr__"] = forward(module.__name__)


def forward(module: str, calls: int = 1) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a module that gave names away.

    The function warns once a name and then leaves the object in the module, where the next look finds it.

    Args:
        module: full name of the old module.
        calls: how many functions lie between the module's user and the returned one, itself included.

    Raises:
        ImportError: by the function, for a name in `GONE`; it says what to use instead.
        AttributeError: by the function, for a name that 0.1.0 did not have there either.
    """
    old = module.removeprefix(f"{PACKAGE}.")

    def lookup(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        advice = GONE.get(f"{old}.{name}") or GONE.get(old)
        if advice:
            raise ImportError(f"{module}.{name} is gone since 0.2: {advice}")
        place, new_name = _find(old, name)
        warnings.warn(
            f"{module}.{name} is now {place.__name__}.{new_name}; the old path works until {UNTIL}.",
            DeprecationWarning,
            stacklevel=1 + calls,
        )
        value: object = getattr(place, new_name)
        setattr(sys.modules[module], name, value)
        return value

    return lookup


def _find(old: str, name: str) -> tuple[ModuleType, str]:
    """Return the module that has the name now, and what it is called there."""
    renamed = RENAMED.get(f"{old}.{name}")
    if renamed:
        place, _, new_name = renamed.rpartition(".")
        return import_module(f"{PACKAGE}.{place}"), new_name
    candidates: Sequence[str] = MOVED.get(old, ())
    for candidate in candidates:
        place_found = import_module(f"{PACKAGE}.{candidate}")
        if hasattr(place_found, name):
            return place_found, name
    raise AttributeError(f"module '{PACKAGE}.{old}' has no attribute {name!r}")
