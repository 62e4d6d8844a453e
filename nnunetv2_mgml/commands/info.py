"""``mgml info``: versions, folders and options, for users and bug reports.

Only ``--fusions`` and ``--options`` import torch.
"""

from __future__ import annotations

import argparse
import json
import textwrap

from nnunetv2_mgml.upstream.registration import DISABLE_VARIABLE, EXT_DIR, EXT_VARIABLE, PTH_NAME
from nnunetv2_mgml.workflows.installation import Installation, export_line, find_installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mgml info``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--ext-dir",
        "--ext_dir",
        dest="ext_dir",
        action="store_true",
        help=f"print only the folder {EXT_VARIABLE} has to name",
    )
    what.add_argument("--fusions", action="store_true", help="list the fusion designs, one a line")
    what.add_argument("--options", action="store_true", help="list the options of `mgml plan --set` and their defaults")
    what.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    if args.ext_dir:
        print(EXT_DIR)
    elif args.fusions:
        print(fusions_text())
    elif args.options:
        print(options_text())
    elif args.json:
        print(json.dumps(find_installation().as_dict(), indent=2))
    else:
        print(summary_text(find_installation()))
    return 0


def summary_text(installation: Installation) -> str:
    """Return what is installed as lines for people."""
    if installation.active:
        found = "on: nnUNetv2_* commands find the trainers by themselves"
    else:
        reason = f"{DISABLE_VARIABLE}=1" if installation.disabled else f"no {PTH_NAME} in this Python's site-packages"
        found = f"off ({reason}); use\n{'':<21}{export_line()}"
    rows = [
        *((name, number or "not installed") for name, number in installation.versions.items()),
        ("trainer folder", EXT_DIR),
        ("start-up line", found),
        *((name, value or "not set") for name, value in installation.environment.items()),
    ]
    return "\n".join(f"{name:<20} {value}" for name, value in rows)


def options_text() -> str:
    """Return every option: ``name = default`` and its explanation."""
    from nnunetv2_mgml.objective import Options

    return "\n".join(
        f"{name} = {default}\n{textwrap.indent(textwrap.fill(text, 112), '    ')}"
        for name, default, text in Options.documentation()
    )


def fusions_text() -> str:
    """Return the registered fusion designs, one a line, the name first."""
    from nnunetv2_mgml.network.fusion import fusion_designs

    designs = fusion_designs()
    width = max(map(len, designs))
    return "\n".join(f"{name:<{width}}  {design.summary}" for name, design in designs.items())
