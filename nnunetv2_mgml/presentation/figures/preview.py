"""A predicted case at a glance: the sequences it was predicted from, the segmentation over each, what to expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_mgml.presentation.figures.qualitative import ORIENTATION_NOTE, overlay, show_image
from nnunetv2_mgml.presentation.figures.slices import content_box, to_grey
from nnunetv2_mgml.presentation.figures.style import label_colours, new_figure, styled


@styled
def preview_sheet(
    images: Mapping[str, npt.NDArray[Any]],
    segmentation: npt.NDArray[Any],
    labels: Mapping[int, str],
    *,
    title: str,
    notes: str = "",
    pixel_aspect: float = 1.0,
    whole_image: bool = False,
    oriented: bool = True,
) -> Figure:
    """Draw one slice: every sequence, and below it the same with the segmentation.

    Args:
        images: modality -> image ``(y, x)``, any number type, those the case was predicted from.
        segmentation: label map ``(y, x)``, 0 is background.
        labels: label value -> name, for the legend.
        title: heading: case, slice, modalities.
        notes: further lines below the images, for example the expected quality.
        pixel_aspect: height of a pixel divided by its width.
        whole_image: do not crop to what is not zero.
        oriented: say that it is in radiological convention.
    """
    colours = label_colours(list(labels))
    box = content_box(segmentation, *([] if whole_image else images.values()))
    if whole_image:
        box = (slice(None), slice(None))
    height, width = segmentation[box].shape
    size = 2.3 if len(images) < 5 else 1.8
    tall = size * height * pixel_aspect / width
    lines = notes.count("\n") + 1 if notes else 0
    figure = new_figure(max(4.6, size * len(images)), 2 * tall + 1.05 + 0.17 * lines, "compressed")
    grid = figure.subplots(2, len(images), squeeze=False)
    for column, (name, image) in enumerate(images.items()):
        grey = to_grey(image)[box]
        show_image(grid[0, column], grey, name, pixel_aspect)
        show_image(grid[1, column], overlay(grey, segmentation[box], colours, fill=0.3), "", pixel_aspect)
    figure.suptitle(title, fontsize=10)
    figure.legend(
        handles=[Patch(color=colours[value], label=name) for value, name in labels.items() if value in colours],
        loc="outside lower center",
        ncols=min(5, max(1, len(labels))),
        title="\n".join(part for part in (notes, ORIENTATION_NOTE * oriented) if part),
        title_fontproperties={"size": 7.5},
    ).get_title().set_multialignment("center")
    return figure
