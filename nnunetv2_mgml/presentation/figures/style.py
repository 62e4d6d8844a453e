"""Colours, type sizes and file output shared by all figures.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart under the common colour-vision
deficiencies; lines also differ by marker, so that a grey print can be read.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import matplotlib.style
from matplotlib.figure import Figure

from nnunetv2_mgml.io.files import replacing

BLACK = "#000000"
GREY = "#6E6E6E"
CYCLE: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Line and bar colours, in order of use."""

MARKERS: tuple[str, ...] = ("o", "s", "^", "D", "v", "P", "X")
"""One marker per colour of `CYCLE`."""

LABEL_CYCLE: tuple[str, ...] = ("#56B4E9", "#F0E442", "#D55E00", "#CC79A7", "#009E73", "#0072B2", "#E69F00")
"""Overlay colours of label values 1, 2, 3, ...: bright enough to be seen over dark grey anatomy."""

SEQUENTIAL = "cividis"
"""Colour map of scores: monotone in lightness, made for colour-vision deficiency."""

HEAT = "inferno"
"""Colour map of confidence and feature maps."""

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "svg.hashsalt": "nnunetv2_mgml",
    "pdf.fonttype": 42,
}

F = TypeVar("F", bound=Callable[..., Any])


def styled(function: F) -> F:
    """Decorator: run a function under our settings and restore the caller's (nnU-Net sets a font scale globally)."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with matplotlib.style.context(["default", _SETTINGS]):
            return function(*args, **kwargs)

    return cast(F, run)


def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """Return an empty figure of a size in inches, laid out so that nothing overlaps or is cut off.

    Args:
        width: inches.
        height: inches.
        layout: ``constrained``, or ``compressed`` for grids of images, which keeps them close together.
    """
    return Figure(figsize=(width, height), layout=layout)


def line_style(index: int) -> dict[str, Any]:
    """Return colour and marker of the ``index``-th line, as keyword arguments of ``Axes.plot``.

    Where colours are used a second time, markers are others, and hollow.
    """
    again, place = divmod(index, len(CYCLE))
    style: dict[str, Any] = {"color": CYCLE[place], "marker": MARKERS[(place + 3 * again) % len(MARKERS)]}
    return {**style, "markerfacecolor": "white"} if again else style


def label_colours(labels: list[int] | tuple[int, ...]) -> dict[int, str]:
    """Return a colour for each label value above 0, by rank, so that labels 1, 2, 4 use the first three colours."""
    return {
        label: LABEL_CYCLE[rank % len(LABEL_CYCLE)]
        for rank, label in enumerate(sorted(value for value in labels if value > 0))
    }


@styled
def figure_bytes(figure: Figure, file_format: str = "png", dpi: int = 150) -> bytes:
    """Return a figure as the content of an image file, without a time stamp, so equal figures are equal bytes.

    Args:
        figure: what one of the figure functions returned.
        file_format: ``png``, ``svg``, ``pdf`` or ``jpg``.
        dpi: resolution of raster formats, in dots per inch.
    """
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(file_format)
    figure.savefig(
        buffer, format=file_format, dpi=dpi, facecolor="white", metadata=metadata, bbox_inches="tight", pad_inches=0.06
    )
    return buffer.getvalue()


def save(figure: Figure, path: str | Path, dpi: int = 200) -> Path:
    """Write a figure in one step (temporary name in the same folder, then rename) and return the path.

    Args:
        figure: what one of the figure functions returned.
        path: the ending chooses the format: ``.png``, ``.svg``, ``.pdf`` or ``.jpg``.
        dpi: resolution of raster formats, in dots per inch.

    Raises:
        ValueError: an ending that is none of these.
    """
    path = Path(path)
    file_format = path.suffix.lower().lstrip(".")
    if file_format not in ("png", "svg", "pdf", "jpg"):
        raise ValueError(f"Cannot write a figure to '{path}': the name must end in .png, .svg, .pdf or .jpg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(figure_bytes(figure, file_format, dpi))
    return path
