"""What the network does inside, for one slice: the paper's figures 9 (single modalities and soft label), 11
(confidence) and 12 (feature channels).

Images are 2D arrays ``(y, x)`` in display orientation (see `slices`); label maps are integers, 0 is background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_mgml.presentation.figures.qualitative import label_edges, overlay, show_image
from nnunetv2_mgml.presentation.figures.slices import content_box, to_grey
from nnunetv2_mgml.presentation.figures.style import HEAT, label_colours, new_figure, styled


@styled
def modality_predictions(
    images: Mapping[str, npt.NDArray[Any]],
    single: Mapping[str, npt.NDArray[Any]],
    soft_label: npt.NDArray[Any] | None,
    fused: npt.NDArray[Any],
    reference: npt.NDArray[Any] | None,
    labels: Mapping[int, str],
    colours: Mapping[int, str] | None = None,
    *,
    title: str = "",
    pixel_aspect: float = 1.0,
) -> Figure:
    """Draw each modality above its own prediction, beside soft label, fused prediction and ground truth (figure 9).

    Args:
        images: modality name -> image ``(y, x)``.
        single: modality name -> label map ``(y, x)`` that the shared decoder predicts from this modality alone.
        soft_label: most probable label of the soft label, ``(y, x)``, or None.
        fused: label map of the fused prediction, ``(y, x)``.
        reference: ground truth ``(y, x)``, or None.
        labels: label value -> name, for the legend.
        colours: label value -> colour; None takes `style.label_colours`.
        title: heading.
        pixel_aspect: height of a pixel divided by its width.
    """
    colours = colours or label_colours(list(labels))
    results = {
        name: labels
        for name, labels in (("Soft label", soft_label), ("Fused", fused), ("Ground truth", reference))
        if labels is not None
    }
    box = content_box(*images.values(), *single.values(), *results.values())
    greys = {name: to_grey(image)[box] for name, image in images.items()}
    under = list(greys.values())[-1]
    columns = len(images) + len(results)
    ratio = under.shape[0] * pixel_aspect / under.shape[1]
    figure = new_figure(1.55 * columns, 2 * (1.55 * ratio + 0.25) + 0.6, "compressed")
    grid = figure.subplots(2, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for (top, bottom), (name, grey) in zip(grid.T, greys.items(), strict=False):
        show_image(top, grey, name, pixel_aspect)
        if name in single:
            show_image(bottom, overlay(grey, single[name][box], colours), f"{name} alone", pixel_aspect)
    for axes, (name, label_map) in zip(grid[1, len(images) :], results.items(), strict=True):
        show_image(axes, overlay(under, label_map[box], colours), name, pixel_aspect)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.legend(
        handles=[Patch(color=colours[v], label=n) for v, n in labels.items() if v in colours],
        loc="outside lower center",
        ncols=max(1, len(labels)),
    )
    return figure


@styled
def confidence_maps(
    image: npt.NDArray[Any],
    probabilities: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    reference: Mapping[str, npt.NDArray[Any]] | None = None,
    *,
    title: str = "",
    pixel_aspect: float = 1.0,
) -> Figure:
    """Draw probability maps, one row per class and one column per prediction (figure 11).

    Args:
        image: the modality shown in the first column, ``(y, x)``.
        probabilities: column title (a subset, or a model) -> row title (a region or label) -> probability ``(y, x)``
            in 0..1. The row ``"confidence"``, if given, is the largest class probability.
        reference: row title -> bool mask ``(y, x)``, outlined in every map of that row and in the first column.
        title: heading.
        pixel_aspect: height of a pixel divided by its width.
    """
    rows = list(dict.fromkeys(name for maps in probabilities.values() for name in maps))
    reference = reference or {}
    box = content_box(image, *reference.values())
    grey = to_grey(image)[box]
    columns = len(probabilities) + 1
    ratio = grey.shape[0] * pixel_aspect / grey.shape[1]
    figure = new_figure(1.6 * columns + 0.7, (1.6 * ratio + 0.08) * len(rows) + 0.7, "compressed")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    mesh = None
    for row, name in enumerate(rows):
        outline = reference.get(name)
        show_image(grid[row, 0], grey, "Image" if row == 0 else "", pixel_aspect)
        grid[row, 0].set_ylabel(name, fontsize=9)
        for column, (head, maps) in enumerate(probabilities.items(), start=1):
            axes = grid[row, column]
            axes.set_axis_off()
            if name in maps:
                show_image(axes, np.zeros_like(grey), head if row == 0 else "", pixel_aspect)
                mesh = axes.imshow(maps[name][box], cmap=HEAT, vmin=0, vmax=1, aspect=pixel_aspect)
        if outline is not None and outline.any() and min(grey.shape) > 1:
            for axes in grid[row]:
                axes.contour(outline[box], levels=[0.5], colors="white", linewidths=0.8, linestyles="--")
    if mesh is not None:
        figure.colorbar(mesh, ax=list(grid.flat), label="Probability", shrink=0.7, pad=0.02)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def telling_channels(features: npt.NDArray[Any], mask: npt.NDArray[Any], count: int) -> list[int]:
    """Return the channels whose activation differs most between the labelled area and the rest.

    The difference of the two means is divided by the channel's standard deviation, so that scale does not matter.

    Args:
        features: ``(C, y, x)`` float.
        mask: labelled area ``(y, x)`` bool, at the features' resolution. If it is empty or everything, the channels
            with the largest standard deviation are taken.
        count: how many channels, at most ``C``.

    Returns:
        Channel indices, the most different first.
    """
    spread = features.std(axis=(1, 2))
    if mask.any() and not mask.all():
        inside, outside = features[:, mask].mean(axis=1), features[:, ~mask].mean(axis=1)
        contrast = np.abs(inside - outside) / np.maximum(spread, 1e-6)
    else:
        contrast = spread
    order = np.argsort(-contrast, kind="stable")
    return [int(channel) for channel in order[:count]]


@styled
def feature_channels(
    features: Mapping[str, npt.NDArray[Any]],
    channels: Sequence[int],
    images: Mapping[str, npt.NDArray[Any]] | None = None,
    reference: npt.NDArray[Any] | None = None,
    *,
    title: str = "",
    pixel_aspect: float = 1.0,
) -> Figure:
    """Draw feature channels of an intermediate layer, one row per source and one column per channel (figure 12).

    Args:
        features: row title (a modality, a subset or a model) -> features ``(C, y, x)`` float of one slice. Each map is
            scaled by itself, between its 1st and 99th percentile.
        channels: channel indices to draw.
        images: row title -> image shown in the first column, ``(y, x)`` at its own resolution; None leaves the column
            out.
        reference: label map outlined on the images, ``(y, x)``, same shape.
        title: heading.
        pixel_aspect: height of a pixel of the images divided by its width; a map is drawn in their shape. Without
            images: of a map's pixel.
    """
    first = 0 if images is None else 1
    columns = len(channels) + first
    example = next(iter(features.values()))
    height, width = example.shape[1:] if images is None else next(iter(images.values())).shape
    ratio = height * pixel_aspect / width
    aspect = ratio * example.shape[2] / example.shape[1]  # strides may differ between the axes
    figure = new_figure(1.3 * columns, (1.3 * ratio + 0.06) * len(features) + 0.6, "compressed")
    grid = figure.subplots(len(features), columns, squeeze=False)
    for row, (name, maps) in enumerate(features.items()):
        if images is not None:
            show_image(grid[row, 0], _outlined(images[name], reference), "Image" if row == 0 else "", pixel_aspect)
        for column, channel in enumerate(channels, start=first):
            axes = grid[row, column]
            low, high = np.percentile(maps[channel], (1, 99))
            show_image(axes, np.zeros(maps[channel].shape, np.uint8), f"channel {channel}" if row == 0 else "", aspect)
            axes.imshow(maps[channel], cmap=HEAT, vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
        grid[row, 0].set_ylabel(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _outlined(image: npt.NDArray[Any], reference: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    coloured = np.repeat(to_grey(image)[..., None], 3, axis=2)
    if reference is not None:
        coloured[label_edges((reference > 0).astype(np.uint8))] = 255
    return coloured
