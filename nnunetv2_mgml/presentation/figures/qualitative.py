"""Qualitative sheets: modalities, ground truth and predictions (the paper's figures 8 and 10).

All images are 2D arrays ``(y, x)`` in display orientation (see `slices`): row 0 is drawn on top. Label maps are
integers with 0 for background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from nnunetv2_mgml.presentation.figures.slices import content_box, to_grey
from nnunetv2_mgml.presentation.figures.style import label_colours, new_figure, styled

FILL = 0.42
"""Opacity of an overlay's filled area; its outline is opaque."""

ORIENTATION_NOTE = "Axial slices in radiological convention: the patient's left is on the right."


@dataclass(frozen=True)
class Case:
    """One case of a sheet, cut at one slice."""

    images: Mapping[str, npt.NDArray[Any]]
    """Modality name -> image ``(y, x)``, any number type."""
    reference: npt.NDArray[Any]
    """Ground truth label map ``(y, x)``."""
    predictions: Mapping[str, npt.NDArray[Any]]
    """Title -> label map ``(y, x)``; the title may have several lines and may hold the score."""
    name: str = ""
    background: str | None = None
    """Modality the label maps are drawn over; None takes the last one."""
    pixel_aspect: float = 1.0
    """Height of a pixel divided by its width (spacing in mm along y over that along x)."""
    present: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Prediction title -> modalities it was made from; where given, one dot per modality shows them in the panel."""
    zoom: bool = False
    """Show the surroundings of the labels only, not the whole head."""
    sides: tuple[str, str] | None = None
    """Letters at the left and right edge of the first panel: ``("R", "L")`` for arrays of `slices.read_axial`."""


def overlay(
    grey: npt.NDArray[Any], labels: npt.NDArray[Any], colours: Mapping[int, str], fill: float = FILL
) -> npt.NDArray[Any]:
    """Blend a label map over an image: filled areas half transparent, their inner edge opaque.

    Args:
        grey: image ``(y, x)`` uint8.
        labels: label map ``(y, x)``; values without a colour are not drawn.
        colours: label value -> colour.
        fill: opacity of the area inside the edge, 0 to 1.

    Returns:
        ``(y, x, 3)`` float in 0..1.
    """
    result = np.repeat(grey[..., None] / 255.0, 3, axis=2)
    edges = label_edges(labels)
    for value, colour in colours.items():
        area = labels == value
        opacity = np.where(edges, 1.0, fill)[area][:, None]
        result[area] = (1 - opacity) * result[area] + opacity * np.array(to_rgb(colour))
    return result


def label_edges(labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return where a labelled pixel touches (4-neighbourhood) another label or background, ``(y, x)`` bool."""
    padded = np.pad(labels, 1, mode="edge")
    centre = padded[1:-1, 1:-1]
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edges: npt.NDArray[Any] = (centre > 0) & np.any([centre != neighbour for neighbour in around], axis=0)
    return edges


@styled
def qualitative_sheet(
    images: Mapping[str, npt.NDArray[Any]],
    reference: npt.NDArray[Any],
    predictions: Mapping[str, npt.NDArray[Any]],
    labels: Mapping[int, str],
    colours: Mapping[int, str] | None = None,
    *,
    title: str = "",
    **options: Any,
) -> Figure:
    """Draw one case: a row of modalities and the ground truth, then the predictions in as many rows as they need.

    Args:
        images: modality name -> image ``(y, x)``.
        reference: ground truth ``(y, x)``.
        predictions: title -> label map ``(y, x)``; the ground truth's outline is drawn over each in white. A panel is
            about 25 characters wide; use line breaks in longer titles.
        labels: label value -> name, for the legend.
        colours: label value -> colour; None takes `style.label_colours`.
        title: heading, for example case and slice.
        **options: other fields of `Case`: ``background``, ``pixel_aspect``, ``present``, ``zoom``, ``sides``.
    """
    case = Case(images, reference, predictions, **options)
    colours = colours or label_colours(list(labels))
    columns = len(images) + 1
    rows = 1 + -(-len(predictions) // columns)
    prepared = _Prepared(case)
    figure = new_figure(1.62 * columns, (1.62 * prepared.height_ratio + 0.42) * rows + 0.6, "compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    prepared.draw_images(grid[0])
    prepared.draw_labels(grid[0, -1], reference, "Ground truth", colours)
    for axes, (name, predicted) in zip(grid[1:].flat, predictions.items(), strict=False):
        prepared.draw_labels(axes, predicted, name, colours, outline=True)
    if title:
        figure.suptitle(title, fontsize=10)
    _legend(figure, labels, colours)
    return figure


@styled
def case_rows(cases: Sequence[Case], labels: Mapping[int, str], colours: Mapping[int, str] | None = None) -> Figure:
    """Draw several cases, one row each: modalities, ground truth, predictions (the paper's figure 8).

    Args:
        cases: cases with the same modalities and the same prediction titles; titles are written once, on top.
        labels: label value -> name, for the legend.
        colours: label value -> colour; None takes `style.label_colours`.

    Raises:
        ValueError: no case, or cases that differ in modalities or titles.
    """
    if not cases:
        raise ValueError("A sheet needs at least one case.")
    heads = [(*case.images, *case.predictions) for case in cases]
    if any(head != heads[0] for head in heads):
        raise ValueError(f"All cases of a sheet need the same columns; found {sorted(set(heads))}.")
    colours = colours or label_colours(list(labels))
    columns = len(heads[0]) + 1
    size = min(1.5, max(0.95, 14.0 / columns))
    prepared = [_Prepared(case) for case in cases]
    figure = new_figure(size * columns, sum(size * one.height_ratio + 0.06 for one in prepared) + 1.0, "compressed")
    grid = figure.subplots(len(cases), columns, squeeze=False, height_ratios=[one.height_ratio for one in prepared])
    for row, (case, ready) in enumerate(zip(cases, prepared, strict=True)):
        ready.draw_images(grid[row], titles=row == 0)
        start = len(case.images)
        ready.draw_labels(grid[row, start], case.reference, "Ground truth", colours, title=row == 0)
        for column, (name, predicted) in enumerate(case.predictions.items(), start=start + 1):
            ready.draw_labels(grid[row, column], predicted, name, colours, outline=True, title=row == 0)
        grid[row, 0].set_ylabel(case.name, fontsize=8)
    _legend(figure, labels, colours)
    return figure


@styled
def comparison_grid(
    image: npt.NDArray[Any],
    reference: npt.NDArray[Any],
    rows: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    labels: Mapping[int, str],
    colours: Mapping[int, str] | None = None,
    *,
    pixel_aspect: float = 1.0,
) -> Figure:
    """Draw one slice predicted by several models (columns) from several subsets (rows; the paper's figure 10).

    Args:
        image: the modality to draw over, ``(y, x)``.
        reference: ground truth ``(y, x)``, drawn as last column of every row and as a white outline.
        rows: row name (the subset) -> column name (the model) -> label map ``(y, x)``.
        labels: label value -> name, for the legend.
        colours: label value -> colour; None takes `style.label_colours`.
        pixel_aspect: height of a pixel divided by its width.
    """
    colours = colours or label_colours(list(labels))
    models = list(dict.fromkeys(name for row in rows.values() for name in row))
    ready = _Prepared(Case({"image": image}, reference, {}, pixel_aspect=pixel_aspect))
    figure = new_figure(
        1.6 * (len(models) + 1) + 0.6, (1.6 * ready.height_ratio + 0.06) * len(rows) + 0.9, "compressed"
    )
    grid = figure.subplots(len(rows), len(models) + 1, squeeze=False)
    for index, (row, predictions) in enumerate(rows.items()):
        for column, model in enumerate(models):
            axes = grid[index, column]
            if model in predictions:
                ready.draw_labels(axes, predictions[model], model, colours, outline=True, title=index == 0)
            else:
                show_image(axes, np.full(ready.shape, 255, np.uint8), "" if index else model, pixel_aspect)
        ready.draw_labels(grid[index, -1], reference, "Ground truth", colours, title=index == 0)
        grid[index, 0].set_ylabel(row, fontsize=8)
    _legend(figure, labels, colours)
    return figure


class _Prepared:
    """Cropped grey images of a case, and the drawing of its label maps."""

    def __init__(self, case: Case) -> None:
        self.case = case
        label_maps = (case.reference, *case.predictions.values())
        self.box = content_box(*case.images.values(), *label_maps)
        if case.zoom and any(labels.any() for labels in label_maps):
            self.box = _square(content_box(*label_maps, margin=max(case.reference.shape) // 12), case.reference.shape)
        self.greys = {name: to_grey(image)[self.box] for name, image in case.images.items()}
        background = list(self.greys)[-1] if case.background is None else case.background
        if background not in self.greys:
            raise ValueError(f"No modality '{background}' to draw over; there are {', '.join(self.greys)}.")
        self.under = self.greys[background]

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.under.shape
        return height, width

    @property
    def height_ratio(self) -> float:
        """Displayed height over displayed width."""
        return self.shape[0] * self.case.pixel_aspect / self.shape[1]

    def draw_images(self, row: Sequence[Axes], *, titles: bool = True) -> None:
        """Draw the modalities into the first axes of a row."""
        for axes, (name, grey) in zip(row, self.greys.items(), strict=False):
            show_image(axes, grey, name if titles else "", self.case.pixel_aspect)
        if self.case.sides:
            for x, letter in zip((0.03, 0.97), self.case.sides, strict=True):
                row[0].text(
                    x,
                    0.97,
                    letter,
                    transform=row[0].transAxes,
                    color="white",
                    fontsize=8,
                    fontweight="bold",
                    ha="left" if x < 0.5 else "right",
                    va="top",
                )

    def draw_labels(
        self,
        axes: Axes,
        labels: npt.NDArray[Any],
        name: str,
        colours: Mapping[int, str],
        *,
        outline: bool = False,
        title: bool = True,
    ) -> None:
        """Draw a label map over the background modality, with the ground truth's outline where asked."""
        show_image(axes, overlay(self.under, labels[self.box], colours), name if title else "", self.case.pixel_aspect)
        reference = self.case.reference[self.box] > 0
        if outline and reference.any() and min(reference.shape) > 1:
            axes.contour(reference, levels=[0.5], colors="white", linewidths=0.8, linestyles="--")
        if name in self.case.present:
            _dots(axes, list(self.case.images), self.case.present[name])


def show_image(axes: Axes, image: npt.NDArray[Any], title: str = "", aspect: float = 1.0) -> None:
    """Draw a grey ``(y, x)`` uint8 or colour ``(y, x, 3)`` image without ticks or frame.

    Args:
        axes: where to draw.
        image: the image, row 0 on top.
        title: small heading; empty for none.
        aspect: height of a pixel divided by its width.
    """
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, aspect=aspect, interpolation="nearest")
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=8.5, pad=3)


def _square(box: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Grow the shorter sides of a box to the longest one, moved to stay inside the image."""
    side = max(part.stop - part.start for part in box)
    result = []
    for part, size in zip(box, shape, strict=True):
        low = (part.start + part.stop - side) // 2
        low = max(0, min(low, size - side))
        result.append(slice(low, min(low + side, size)))
    return tuple(result)


def _dots(axes: Axes, channels: Sequence[str], present: Sequence[str]) -> None:
    """Draw one dot per modality near the lower edge, filled where it is present."""
    for index, name in enumerate(channels):
        x = 0.5 + 0.09 * (index - (len(channels) - 1) / 2)
        axes.plot(
            [x],
            [0.05],
            marker="o",
            markersize=4.5,
            transform=axes.transAxes,
            markeredgecolor="white",
            markeredgewidth=0.8,
            color="white" if name in present else "#303030",
        )


def _legend(figure: Figure, labels: Mapping[int, str], colours: Mapping[int, str]) -> None:
    handles: list[Artist] = [
        Patch(color=colours[value], label=name) for value, name in labels.items() if value in colours
    ]
    handles.append(
        Line2D(
            [],
            [],
            color="white",
            linestyle="--",
            linewidth=1.2,
            label="outline of the ground truth",
            path_effects=[withStroke(linewidth=6, foreground="#404040")],
        )
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(len(handles), 5)))
