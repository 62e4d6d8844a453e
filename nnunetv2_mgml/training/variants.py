"""Trainers that differ in options: the paper's ablations (its terms alone), the stock network, published designs."""

# ruff: noqa: N801  nnU-Net's naming scheme: the class name is the argument of -tr

from __future__ import annotations

import logging
from typing import Any

from nnunetv2_mgml.network.fusion import FusionDesign, fusion_designs
from nnunetv2_mgml.training.learners import Learner
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
    """The multi-encoder network with the segmentation losses only."""

    config_overrides = {"soft_label": "none", "consistency_weight": 0.0, "complete_view_weight": 0.0}


class nnUNetTrainerMGML_paperTerms(nnUNetTrainerMGML):
    """The paper's MGML, Meta-AMF and L_CR, without the loss on the complete view that our default adds."""

    config_overrides = {"complete_view_weight": 0.0}


class nnUNetTrainerModalityDropout(nnUNetTrainerMGML):
    """The stock nnU-Net network, trained with random channels empty: what one would try first."""

    learner_class = Learner


def trainers_of(design: type[FusionDesign]) -> dict[str, type[nnUNetTrainerMGML]]:
    """Return the two trainers named after the publication of a fusion design, by name; none where it names none.

    ``nnUNetTrainerX`` is `nnUNetTrainerMGML_baseline` and ``nnUNetTrainerX_MGML`` is `nnUNetTrainerMGML` on plans
    written with ``mgml plan --set fusion=...`` and the design's ``published_options``; the former also has its
    ``published_alone``. All other options are the plans' own. ``fusion_options`` of the plans count where they were set
    for the same design, and win over the published ones; those of another design are dropped, which the log says.
    ``_MGML`` includes our loss on the complete view; without it are the paper's terms: ``complete_view_weight=0`` in
    the plans.

    One framework, preprocessing, encoder and decoder, so that only the fusion (and MGML) differs: these are the designs
    inside our network, not the authors' code.
    """
    publication = vars(design).get("trainer", "")  # not inherited: a subclass of a design is another design
    if not publication:
        return {}
    published = {"fusion": design.name, **design.published_options}
    alone = {**nnUNetTrainerMGML_baseline.config_overrides, **published, **design.published_alone}
    name = f"nnUNetTrainer{publication}"
    return {
        name: _trainer(name, f"{design.name}: {design.summary}.", alone),
        f"{name}_MGML": _trainer(f"{name}_MGML", f"{design.name} with MGML: {design.summary}.", published),
    }


def _trainer(name: str, doc: str, overrides: dict[str, Any]) -> type[nnUNetTrainerMGML]:
    return type(name, (nnUNetTrainerMGML,), {"__module__": __name__, "__doc__": doc, "config_overrides": overrides})


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
