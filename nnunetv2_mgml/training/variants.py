"""Trainers that differ in options: the paper's ablations (its terms alone), the stock network, published designs."""

# ruff: noqa: N801  nnU-Net's naming scheme: the class name is the argument of -tr

from __future__ import annotations

import logging
from typing import Any

from nnunetv2_mgml.network.fusion import FusionDesign, fusion_designs
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.base import OURS
from nnunetv2_mgml.plans.options import SamplingOptions
from nnunetv2_mgml.training.learners import ConditionedLearner, Learner
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML

_OWN = "nnunetv2_mgml."
_log = logging.getLogger(__name__)


class nnUNetTrainerMGML_noConsistency(nnUNetTrainerMGML):
    """Without L_CR (the paper's "Baseline + Meta-AMF")."""

    config_overrides = {"consistency_weight": 0.0, "complete_view_weight": 0.0}


class nnUNetTrainerMGML_noMetaAMF(nnUNetTrainerMGML):
    """Without the soft label (the paper's "Baseline + L_CR")."""

    config_overrides = {"soft_label": "none", "complete_view_weight": 0.0}


class nnUNetTrainerMGML_fixedSoftLabels(nnUNetTrainerMGML):
    """Soft labels from fixed parameters (the paper's FPSLD, Table 2), without L_CR."""

    config_overrides = {"soft_label": "fixed", "consistency_weight": 0.0, "complete_view_weight": 0.0}


class nnUNetTrainerMGML_baseline(nnUNetTrainerMGML):
    """The same network with the segmentation losses only."""

    config_overrides = {"soft_label": "none", "consistency_weight": 0.0, "complete_view_weight": 0.0}


class nnUNetTrainerMGML_paperTerms(nnUNetTrainerMGML):
    """The paper's terms, Meta-AMF and L_CR, without the loss on the complete view that our default adds."""

    config_overrides = {"complete_view_weight": 0.0}


class nnUNetTrainerModalityDropout(nnUNetTrainerMGML):
    """The stock nnU-Net network, trained with random channels empty: what one would try first."""

    learner_class = Learner


class nnUNetTrainerModalityDropout_conditional(nnUNetTrainerModalityDropout):
    """Like nnUNetTrainerModalityDropout, its norms scaled and shifted by what is visible (conditional norms)."""

    learner_class = ConditionedLearner


class TrainerOfDesign(nnUNetTrainerMGML):
    """Base of the trainers named after a publication: its weights are those of the publication's own total.

    Where the plans ask for another total, theirs count: a published reading of MGML, whose presets set them, and
    PASSION's rebalancing, which sums the shared decoder's loss over the modalities itself. So does their
    ``mask_sampling``, where it is not the default: how modalities are hidden is no part of a design.
    """

    @classmethod
    def fixed_on(cls, planned: Options) -> dict[str, Any]:
        """Return the ``config_overrides`` without those that give way to these plans."""
        given_way: set[str] = set()
        if planned.value("reading") != OURS:  # a weight of 0 says that the publication lacks the part
            given_way = {
                name for name in ("modality_decoder_weight", "auxiliary_weight") if cls.config_overrides.get(name)
            }
        elif planned.value("rebalancing") != "none":
            given_way = {"modality_decoder_weight"}
        if planned.sampling.mask_sampling != SamplingOptions().mask_sampling and cls._samples_as_published():
            given_way.add("mask_sampling")
        return {k: v for k, v in cls.config_overrides.items() if k not in given_way}

    @classmethod
    def _samples_as_published(cls) -> bool:
        """Whether the sampling is the design's, not one that a subclass fixes."""
        design = fusion_designs().get(cls.config_overrides["fusion"])
        published = {} if design is None else design.published_options
        return published.get("mask_sampling") == cls.config_overrides.get("mask_sampling")


def trainers_of(design: type[FusionDesign]) -> dict[str, type[nnUNetTrainerMGML]]:
    """Return the two trainers named after the publication of a fusion design, by name; none where it names none.

    ``nnUNetTrainerX`` is `nnUNetTrainerMGML_baseline` and ``nnUNetTrainerX_MGML`` is `nnUNetTrainerMGML` on plans
    written with ``mgml plan --set fusion=... network_form=multi_encoder modality_decoder_scale=0
    conditional_norms=false complete_every=1`` and the design's ``published_options``; the former also has its
    ``published_alone``. All other options are the plans' own. ``fusion_options`` of the plans count where they were
    set for the same design, and win over the published ones; those of another design are dropped, which the log
    says. ``_MGML`` includes our loss on the complete view; without it are the paper's terms:
    ``complete_view_weight=0`` in the plans.

    One framework, preprocessing, encoder and decoder, so that only the fusion (and MGML) differs: these are the designs
    inside our network, not the authors' code.
    The publication's weights of losses give way to the plans' where those have another total, and its sampling of
    modalities where they have another than the default (`TrainerOfDesign`).
    """
    publication = vars(design).get("trainer", "")  # not inherited: a subclass of a design is another design
    if not publication:
        return {}
    as_published = {
        "network_form": "multi_encoder",
        "modality_decoder_scale": 0,
        "conditional_norms": False,
        "complete_every": 1,
    }
    published = {"fusion": design.name, **as_published, **design.published_options}
    alone = {**nnUNetTrainerMGML_baseline.config_overrides, **published, **design.published_alone}
    name = f"nnUNetTrainer{publication}"
    return {
        name: _trainer(name, f"{design.name}: {design.summary}.", alone),
        f"{name}_MGML": _trainer(f"{name}_MGML", f"{design.name} with MGML: {design.summary}.", published),
    }


def _trainer(name: str, doc: str, overrides: dict[str, Any]) -> type[nnUNetTrainerMGML]:
    return type(name, (TrainerOfDesign,), {"__module__": __name__, "__doc__": doc, "config_overrides": overrides})


def _add_trainers_of_designs() -> None:
    """Put the trainers of all designs beside those above, where nnU-Net and pickle look for them by name."""
    own_first = sorted(fusion_designs().values(), key=lambda design: not design.__module__.startswith(_OWN))
    for design in own_first:
        made = trainers_of(design)
        taken = sorted(set(made) & set(globals()))
        if taken:
            _log.warning(
                "Fusion design '%s' (%s) gets no trainers: there is a %s already. Its class attribute 'trainer' must "
                "be another name.",
                design.name,
                design.__module__,
                " and a ".join(taken),
            )
        else:
            globals().update(made)


_add_trainers_of_designs()
