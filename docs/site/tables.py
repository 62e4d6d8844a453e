"""Reference pages made from the registries: public names, options, commands, trainers, fusion designs, terms, metrics.

``mkdocs build`` asks for them through `hooks`; nothing here is written down twice. ``python docs/site/tables.py NAME``
prints a page.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import nnunetv2_mgml
from nnunetv2_mgml.commands import main as command_line

_TAKEN_OVER = {
    "train": "All arguments are those of `nnUNetv2_train`; `-tr nnUNetTrainerMGML` unless another is given.",
    "preprocess": "All arguments are those of `nnUNetv2_plan_and_preprocess`.",
    "predict": "All arguments are those of `nnUNetv2_predict` (with `-m`: of `nnUNetv2_predict_from_modelfolder`), "
    "`-tr nnUNetTrainerMGML` unless another is given, and these:",
}
_OPTIONS_NOTE = "Set them with `mgml plan -d DATASET --set NAME=VALUE ...`; `mgml info --options` prints this list."


def pages() -> dict[str, str]:
    """Return page name -> Markdown of the whole reference."""
    return {
        "api": api(),
        "options": options(),
        "commands": commands(),
        "trainers": trainers(),
        "fusion-designs": fusion_designs(),
        "terms": terms(),
        "metrics": metrics(),
    }


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; bars and line ends in cells are escaped."""
    lines = ([_cell(cell) for cell in row] for row in (heading, ["---"] * len(heading), *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def one_line(value: object) -> str:
    """Return the first sentence of an object's docstring."""
    text = inspect.getdoc(value) or ""
    return re.split(r"(?<=\.)\s", text.split("\n\n")[0].replace("\n", " "), maxsplit=1)[0]


def api() -> str:
    """Return the page of the public names, rendered by mkdocstrings from their docstrings."""
    blocks = []
    for name in nnunetv2_mgml.__all__:
        module, _, attribute = nnunetv2_mgml._PLACES[name].partition(":")
        folder = "" if module.startswith("dataset_conversion.") else "nnunetv2_mgml."  # lies beside the package
        place = f"{folder}{module}.{attribute or name}"
        blocks.append(f"## `{name}` {{ #{name} }}\n\n::: {place}\n    options:\n      show_root_heading: false\n")
    introduction = (
        "# Public names\n\nImport them from the top: `from nnunetv2_mgml import MGMLPredictor`. Other modules may move "
        "without notice. Importing the package imports neither torch nor nnU-Net, only the first use of a name does.\n"
    )
    return "\n".join([introduction, *blocks])


def options() -> str:
    """Return the table of all options."""
    from nnunetv2_mgml.objective import Options

    rows = [(f"`{name}`", f"`{default}`", text) for name, default, text in Options.documentation()]
    return f"# Options\n\n{_OPTIONS_NOTE}\n\n{table(('name', 'default', 'meaning'), rows)}\n"


def commands() -> str:
    """Return all commands with their arguments, as their parsers have them."""
    text = ["# Commands", "", "`mgml COMMAND -h` prints the same.", ""]
    for name, command in command_line.COMMANDS.items():
        summary = f"{command.summary[0].upper()}{command.summary[1:]}."
        text += [f"## mgml {name}", "", summary, "", f"```bash\n{command.example}\n```", ""]
        if name in _TAKEN_OVER:
            text += [_TAKEN_OVER[name], ""]
        if name not in ("train", "preprocess"):
            text += _arguments(_parser(name), f"mgml {name}")
    return "\n".join(text)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mgml {name}", formatter_class=command_line._HelpFormatter)
    importlib.import_module(command_line.COMMANDS[name].module).add_arguments(parser)
    return parser


def _arguments(parser: argparse.ArgumentParser, title: str) -> Iterator[str]:
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        plain = [action for action in actions if not isinstance(action, argparse._SubParsersAction)]
        if plain:
            if group.title not in ("positional arguments", "options"):
                yield from (f"**{group.title}**" + (f": {group.description}" if group.description else ""), "")
            rows = [(_spelling(a), formatter._expand_help(a) if a.help else "") for a in plain]
            yield from (table(("argument", "meaning"), rows), "")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, child in action.choices.items():
                yield from (f"### {title} {name}", "", f"{child.description or summaries.get(name, '')}", "")
                yield from _arguments(child, f"{title} {name}")


def _spelling(action: argparse.Action) -> str:
    value = action.metavar or (None if action.nargs == 0 else action.dest.upper())
    if isinstance(value, tuple):
        value = " ".join(value)
    elif action.choices and not action.metavar:
        value = f"{{{','.join(map(str, action.choices))}}}"
    if action.nargs in ("+", "*") and value:
        value = f"{value} ..."
    names = ", ".join(action.option_strings)
    return f"`{' '.join(part for part in (names, value) if part)}`"


def trainers() -> str:
    """Return the table of all trainers, for ``-tr``."""
    from nnunetv2_mgml.training import TRAINERS

    rows = [(f"`{name}`", one_line(trainer)) for name, trainer in sorted(TRAINERS.items())]
    text = table(("name", "what it is"), rows)
    return f"# Trainers\n\nFor `-tr` of `nnUNetv2_train` and `nnUNetv2_predict`.\n\n{text}\n"


def fusion_designs() -> str:
    """Return the table of the registered fusion designs."""
    from nnunetv2_mgml.network.fusion import fusion_designs as designs

    rows = [
        (
            f"`{name}`",
            design.summary,
            ", ".join(f"`{option}` ({json.dumps(value)})" for option, value in design.default_options.items()) or "-",
            "yes" if design.weights_depend_on_modality else "no",
        )
        for name, design in designs().items()
    ]
    heading = ("name", "what it is", "options (default)", "weights depend on the number of modalities")
    return (
        f"# Fusion designs\n\nFor `mgml plan --set fusion=NAME`; what each does and where it differs from its paper: "
        f"[Fusion designs](../fusion.md).\n\n{table(heading, rows)}\n"
    )


def terms() -> str:
    """Return the table of the registered loss terms."""
    from nnunetv2_mgml.objective import loss_terms

    rows = [
        (f"`{name}`", term.summary, ", ".join(f"`{option}`" for option in term.option_group.names()))
        for name, term in loss_terms().items()
        if term.option_group is not None
    ]
    return (
        f"# Loss terms\n\nIn the order in which they are computed; how to add one: [Loss terms](../terms.md).\n\n"
        f"{table(('name', 'what it is', 'options'), rows)}\n"
    )


def metrics() -> str:
    """Return the table of the registered metrics."""
    from nnunetv2_mgml.scoring.metrics import all_metrics

    better = {True: "higher", False: "lower", None: "nearest to 0"}
    rows = [
        (f"`{name}`", metric.title, metric.unit, better[metric.higher_is_better], "no" if metric.optional else "yes")
        for name, metric in all_metrics().items()
    ]
    heading = ("name", "in tables", "unit", "better", "by default")
    return (
        f"# Metrics\n\nFor `mgml evaluate --metrics`; definitions and values for empty masks: "
        f"[Evaluating](../evaluation.md#metrics).\n\n{table(heading, rows)}\n"
    )


if __name__ == "__main__":
    print(pages()[sys.argv[1]])
