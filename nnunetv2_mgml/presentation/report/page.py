"""Put the parts together: one HTML page that needs no other file and no network."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from markupsafe import Markup

import nnunetv2_mgml
from nnunetv2_mgml.presentation.report import content
from nnunetv2_mgml.presentation.report.charts import Picture
from nnunetv2_mgml.presentation.report.sprites import grey_step
from nnunetv2_mgml.presentation.tables import display_name
from nnunetv2_mgml.scoring.metrics import Metric, get_metric
from nnunetv2_mgml.scoring.results import Evaluation


@dataclass
class Pictures:
    """The page's pictures by section; an empty section is left out."""

    charts: list[Picture] = field(default_factory=list)
    sheets: list[Picture] = field(default_factory=list)
    internals: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Viewer:
    """The slice viewer's data, and what the page says about its limits."""

    data: dict[str, Any]
    note: str


def viewer_data(
    evaluation: Evaluation,
    metric: Metric,
    cases: Sequence[dict[str, Any]],
    labels: dict[int, str],
    colours: dict[int, str],
) -> dict[str, Any]:
    """Assemble the viewer's data.

    Args:
        evaluation: the evaluation.
        metric: the score shown beside the pictures.
        cases: what `sprites.viewer_case` returned.
        labels: label value -> name.
        colours: label value -> ``#rrggbb``.
    """
    return {
        "cases": [{**case, "scores": content.scores_for_viewer(evaluation, metric, case["name"])} for case in cases],
        "subsets": [
            {"name": name, "title": content.subset_title(subset, evaluation.channels)}
            for subset, name in zip(evaluation.subsets, evaluation.subset_names, strict=True)
        ],
        "modalities": list(evaluation.channels),
        "titles": {name: display_name(name) for name in evaluation.channels},
        "regions": evaluation.region_names,
        "regionTitles": evaluation.region_titles,
        "labels": [{"name": labels[value], "colour": colours[value]} for value in sorted(labels)],
        "greyStep": grey_step(list(labels)),
        "scoreTitle": f"{metric.title} ({metric.unit})",
    }


def build_page(evaluation: Evaluation, title: str, pictures: Pictures, viewer: Viewer | None = None) -> str:
    """Return the page.

    Args:
        evaluation: what the tables are made from.
        title: heading of the page.
        pictures: figures by section.
        viewer: the slice viewer, or None.

    Returns:
        HTML. Texts from outside (case names, labels, commands) are escaped by the template.
    """
    metric = content.headline_metric(evaluation)
    extra = [content.worth_table(evaluation, metric), content.inversions_table(evaluation)]
    others = [content.subset_table(evaluation, get_metric(name)) for name in evaluation.metrics if name != metric.name]
    more = [content.case_table(evaluation, metric), *filter(None, extra), *others]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        title=title,
        version=nnunetv2_mgml.__version__,
        findings=content.findings(evaluation, metric),
        facts=content.facts(evaluation),
        main_table=content.subset_table(evaluation, metric),
        more_tables=more,
        charts=pictures.charts,
        sheets=pictures.sheets,
        internals=pictures.internals,
        viewer=viewer and viewer.data,
        viewer_note=viewer and viewer.note,
        style=Markup(_asset("style.css")),
        table_script=Markup(_asset("table.js")),
        viewer_script=Markup(_asset("viewer.js")),
    )


def _asset(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
