"""The viewer's data: 8-bit pictures of slices and label masks, small enough to travel inside the page.

A *sprite* is one image file with the chosen slices of a volume as tiles, row by row. Images are JPEG; label masks are
grey PNG in which label number ``i`` (by rank, 0 is background) has the grey value ``i * step``, far enough apart to
survive a browser that perturbs pixels it is asked for.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from nnunetv2_mgml.presentation.figures.slices import content_box, telling_slice, to_grey
from nnunetv2_mgml.presentation.report.cases import CaseVolumes
from nnunetv2_mgml.presentation.report.charts import data_uri

MAX_SLICES = 40
"""Slices per case; with more, every second, third, ... is taken."""
MAX_SIDE = 256
"""Pixels of the longer side of a slice; larger ones are reduced by a whole factor."""
MARGIN = 3
"""Slices shown beyond the labelled ones."""
_BLOCK = 8
"""Tile sides are multiples of JPEG's block, so that no tile bleeds into the next."""
_QUALITY = 82


def choose_slices(label_maps: Sequence[npt.NDArray[Any]], most: int = MAX_SLICES) -> npt.NDArray[Any]:
    """Return the axial slices to show: all that hold a label and a margin, thinned evenly to at most ``most``.

    Args:
        label_maps: label maps ``(z, y, x)`` of one shape, the reference first; its most telling slice is always kept.
        most: upper limit.

    Returns:
        Increasing slice indices. Without any label the middle slices.
    """
    depth = label_maps[0].shape[0]
    used = np.flatnonzero(np.any([(labels > 0).any(axis=(1, 2)) for labels in label_maps], axis=0))
    best = telling_slice(label_maps[0])
    if used.size:
        low, high = max(int(used[0]) - MARGIN, 0), min(int(used[-1]) + MARGIN, depth - 1)
    else:
        low, high = max(best - most // 2, 0), min(best + most // 2 - 1, depth - 1)
    best = min(max(best, low), high)
    step = -(-(high - low + 1) // most)
    return np.arange(low + (best - low) % step, high + 1, step)


def viewer_case(volumes: CaseVolumes, labels: Sequence[int]) -> dict[str, Any]:
    """Return what ``viewer.js`` needs of one case, JSON-ready.

    Args:
        volumes: the case.
        labels: label values in increasing order; others are drawn as background.
    """
    label_maps = [volumes.reference, *volumes.predictions.values()]
    slices = choose_slices(label_maps)
    _, rows, columns = content_box(*volumes.images.values(), *label_maps, margin=4)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    factor = -(-max(height, width) // MAX_SIDE)
    small = (-(-height // factor), -(-width // factor))
    layout = _Layout(len(slices), small)

    def image(volume: npt.NDArray[Any]) -> str:
        grey = to_grey(volume)[slices][:, rows, columns]
        return layout.jpeg(_shrink(grey, factor))

    def mask(volume: npt.NDArray[Any]) -> str:
        cut = volume[slices][:, rows, columns][:, factor // 2 :: factor, factor // 2 :: factor]
        return layout.png(_ranks(_padded(cut, small), labels))

    return {
        "name": volumes.name,
        "slices": [int(z) for z in slices],
        "depth": int(volumes.reference.shape[0]),
        "best": int(np.argmin(np.abs(slices - telling_slice(volumes.reference)))),
        "height": small[0],
        "width": small[1],
        "tileHeight": layout.tile[0],
        "tileWidth": layout.tile[1],
        "columns": layout.columns,
        "aspect": float(volumes.spacing[1] / volumes.spacing[2]),
        "factor": factor,
        "sides": volumes.sides,
        "images": {name: image(volume) for name, volume in volumes.images.items()},
        "reference": mask(volumes.reference),
        "predictions": {subset: mask(volume) for subset, volume in volumes.predictions.items()},
    }


def grey_step(labels: Sequence[int]) -> int:
    """Return the distance of grey values of neighbouring labels in a mask.

    Raises:
        ValueError: more than 255 labels.
    """
    if len(labels) > 255:
        raise ValueError(f"The viewer can show up to 255 labels, the data set has {len(labels)}.")
    return 255 // max(len(labels), 1)


class _Layout:
    """Where the tiles of a sprite lie."""

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        self.size = size
        self.tile = tuple(-(-n // _BLOCK) * _BLOCK for n in size)
        self.columns = int(np.ceil(np.sqrt(count)))
        self.rows = -(-count // self.columns)

    def sheet(self, slices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Lay out ``(n, y, x)`` uint8 slices as one image."""
        (height, width), (tile_height, tile_width) = self.size, self.tile
        result = np.zeros((self.rows * tile_height, self.columns * tile_width), np.uint8)
        for index, picture in enumerate(slices):
            top, left = index // self.columns * tile_height, index % self.columns * tile_width
            result[top : top + height, left : left + width] = picture
        return result

    def jpeg(self, slices: npt.NDArray[Any]) -> str:
        return _encode(self.sheet(slices), "jpg", format="JPEG", quality=_QUALITY, optimize=True)

    def png(self, slices: npt.NDArray[Any]) -> str:
        return _encode(self.sheet(slices), "png", format="PNG", optimize=True)


def _encode(sheet: npt.NDArray[Any], file_format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, **options)
    return data_uri(buffer.getvalue(), file_format)


def _shrink(slices: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    """Average blocks of ``factor`` x ``factor`` pixels of ``(n, y, x)`` uint8."""
    if factor == 1:
        return slices
    height, width = (-(-n // factor) * factor for n in slices.shape[1:])
    padded = _padded(slices, (height, width))
    blocks = padded.reshape(len(slices), height // factor, factor, width // factor, factor)
    means: npt.NDArray[Any] = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
    return means


def _padded(slices: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    missing = [(0, 0), *((0, want - have) for want, have in zip(size, slices.shape[1:], strict=True))]
    return np.pad(slices, missing)


def _ranks(slices: npt.NDArray[Any], labels: Sequence[int]) -> npt.NDArray[Any]:
    result = np.zeros(slices.shape, np.uint8)
    step = grey_step(labels)
    for rank, value in enumerate(labels, start=1):
        result[slices == value] = rank * step
    return result
