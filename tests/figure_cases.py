"""What the tests of figures share."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

LABELS = {1: "edema", 2: "necrosis"}


def texts(figure: Figure) -> list[str]:
    """All texts a reader sees."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text()]
