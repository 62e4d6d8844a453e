"""Figure of the ablation: what MGML changes per subset of the modalities, and per fusion design."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from collect import Result, difference, select
from matplotlib.axes import Axes

from nnunetv2_mgml.presentation.figures.style import BLACK, CYCLE, GREY, new_figure, save, styled


@styled
def draw(results: Sequence[Result], path: Path) -> None:
    """Draw to a file; panels without results say so."""
    drawing = new_figure(9.5, 4.2)
    left, right = drawing.subplots(1, 2, width_ratios=(3, 2))
    _subsets(left, results)
    _designs(right, results)
    save(drawing, path)


def _subsets(axes: Axes, results: Sequence[Result]) -> None:
    baseline = select(results, "main", "region_aware", "baseline")
    variants = [v for v in ("mgml_paper_terms", "complete_view", "mgml") if select(results, "main", "region_aware", v)]
    for index, variant in enumerate(variants):
        change = difference(baseline, select(results, "main", "region_aware", variant))
        if change is not None:
            rows = [row + 0.22 * (index - 1) for row in range(len(change.subsets))]
            axes.plot(list(change.subsets.values()), rows, "os^"[index], color=CYCLE[index], label=variant)
            axes.set_yticks(range(len(change.subsets)), list(change.subsets))
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("difference to the baseline, Dice points (mean of WT, TC, ET)")
    axes.set_title("region_aware, per subset")
    if variants:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(variants))


def _designs(axes: Axes, results: Sequence[Result]) -> None:
    found = [r for r in results if r.run.group in ("main", "designs")]
    labels = []
    for design in sorted({r.run.design for r in found}):
        change = difference(
            select(found, design=design, variant="baseline"), select(found, design=design, variant="mgml")
        )
        if change is None:
            continue
        row = len(labels)
        labels.append(design)
        axes.plot((change.low, change.high), (row, row), color=CYCLE[0])
        axes.plot(change.mean, row, "o", color=CYCLE[0])
        axes.plot(change.per_seed, [row + 0.22] * len(change.per_seed), ".", color=GREY, markersize=4)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(max(len(labels), 2) - 0.5, -0.5)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_xlabel("MGML - baseline, Dice points;\n95 % interval over cases, dots: seeds")
    axes.set_title("per fusion design")
