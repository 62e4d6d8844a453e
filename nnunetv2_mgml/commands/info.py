"""``mgml info``: versions, folders and options, for users and bug reports.

Only ``--fusions`` and ``--options`` import torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import site
import textwrap
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nnunetv2_mgml import __version__
from nnunetv2_mgml.upstream.registration import DISABLE_VARIABLE, EXT_DIR, EXT_VARIABLE, PTH_NAME

_NNUNET_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


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
        print(json.dumps(collect(), indent=2))
    else:
        print(summary_text(collect()))
    return 0


def collect() -> dict[str, Any]:
    """Return versions, folders, the state of the start-up line and nnU-Net's variables, JSON-ready."""
    pth = start_up_file()
    return {
        "versions": {
            "nnunetv2_mgml": __version__,
            "python": platform.python_version(),
            **{name: _installed_version(name) for name in ("nnunetv2", "torch")},
        },
        "ext_dir": EXT_DIR,
        "start_up_line": {
            "file": pth,
            "disabled": os.environ.get(DISABLE_VARIABLE) == "1",
            "active": pth is not None and os.environ.get(DISABLE_VARIABLE) != "1",
        },
        "environment": {name: os.environ.get(name) for name in (*_NNUNET_VARIABLES, EXT_VARIABLE)},
    }


def start_up_file() -> str | None:
    """Return the installed .pth file that this Python reads at start-up, or None."""
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    files = [os.path.join(folder, PTH_NAME) for folder in folders]
    return next((file for file in files if os.path.isfile(file)), None)


def export_line() -> str:
    """Return the shell line that replaces the start-up line."""
    present = os.environ.get(EXT_VARIABLE, "")
    folders = [folder for folder in present.split(os.pathsep) if folder and folder != EXT_DIR]
    return f'export {EXT_VARIABLE}="{os.pathsep.join([*folders, EXT_DIR])}"'


def summary_text(state: dict[str, Any]) -> str:
    """Return the state of `collect` as lines for people."""
    line = state["start_up_line"]
    if line["active"]:
        found = "on: nnUNetv2_* commands find the trainers by themselves"
    else:
        reason = f"{DISABLE_VARIABLE}=1" if line["disabled"] else f"no {PTH_NAME} in this Python's site-packages"
        found = f"off ({reason}); use\n{'':<21}{export_line()}"
    rows = [
        *((name, number or "not installed") for name, number in state["versions"].items()),
        ("trainer folder", state["ext_dir"]),
        ("start-up line", found),
        *((name, value or "not set") for name, value in state["environment"].items()),
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


def _installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
