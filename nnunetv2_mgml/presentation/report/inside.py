"""Pictures of what the network holds inside for one case (the paper's figures 9, 11 and 12)."""

from __future__ import annotations

import numpy as np

from nnunetv2_mgml.modalities import parse_subset
from nnunetv2_mgml.presentation.figures.internals import (
    confidence_maps,
    feature_channels,
    modality_predictions,
    telling_channels,
)
from nnunetv2_mgml.presentation.internals import Internals
from nnunetv2_mgml.presentation.report.charts import Picture, picture
from nnunetv2_mgml.presentation.report.sheets import label_names, short_title
from nnunetv2_mgml.presentation.tables import display_name
from nnunetv2_mgml.scoring.results import Evaluation

_CHANNELS_SHOWN = 8
_DPI = 110


def patch_caption(internals: Internals) -> str:
    """Return what all three figures show, as the end of their captions."""
    convention = ", in radiological convention" if internals.sides_known else ""
    return f"One patch of the network's size around the tumour, run once (no sliding window, no mirroring){convention}."


def inside_pictures(evaluation: Evaluation, case: str, internals: Internals, colours: dict[int, str]) -> list[Picture]:
    """Draw the three figures.

    Args:
        evaluation: for names of labels and regions.
        case: case name, for the titles.
        internals: what `compute_internals` returned.
        colours: label value -> colour.
    """
    images = {display_name(name): image for name, image in internals.images.items()}
    aspect = internals.pixel_aspect
    pictures = []
    if internals.single:
        pictures.append(_predictions(evaluation, case, internals, colours))
    titles = evaluation.region_titles
    masks = {titles[name]: np.isin(internals.reference, values) for name, values in evaluation.regions.items()}
    probabilities = {
        short_title(parse_subset(subset, evaluation.channels), evaluation): {
            titles.get(name, name): values for name, values in maps.items()
        }
        for subset, maps in internals.probabilities.items()
    }
    pictures.append(
        picture(
            f"{case}: confidence",
            f"Probability of each region, and the network's certainty whatever it answers, by "
            f"available modalities; dashed: ground truth. {patch_caption(internals)}",
            confidence_maps(list(images.values())[-1], probabilities, masks, pixel_aspect=aspect),
            "png",
            _DPI,
        )
    )
    maps = {display_name(name): values for name, values in internals.features.items()}
    pooled = np.mean(list(maps.values()), axis=0)
    chosen = telling_channels(pooled, internals.feature_reference, _CHANNELS_SHOWN)
    pictures.append(
        picture(
            f"{case}: features",
            f"Encoder features at scale {internals.scale} (0 is full resolution), before fusion: the "
            f"{len(chosen)} of {len(pooled)} channels in which tumour and surroundings differ most. "
            f"Each map has a scale of its own. {patch_caption(internals)}",
            feature_channels(maps, chosen, images, internals.reference, pixel_aspect=aspect),
            "png",
            _DPI,
        )
    )
    return pictures


def _predictions(evaluation: Evaluation, case: str, internals: Internals, colours: dict[int, str]) -> Picture:
    parameters = ", ".join(f"{name} {value:.3g}" for name, value in internals.meta_parameters.items())
    soft = "the soft label built from them" + (f" ({parameters})" if parameters else "")
    figure = modality_predictions(
        {display_name(name): image for name, image in internals.images.items()},
        {display_name(name): labels for name, labels in internals.single.items()},
        internals.soft_label,
        internals.fused,
        internals.reference,
        label_names(evaluation),
        colours,
        pixel_aspect=internals.pixel_aspect,
    )
    return picture(
        f"{case}: each modality alone, soft label, fused prediction",
        f"What the shared decoder predicts from each modality alone, "
        f"{soft if internals.soft_label is not None else 'no soft label (the model was trained without)'}, "
        f"and the fused prediction. {patch_caption(internals)}",
        figure,
        "png",
        _DPI,
    )
