"""Makes nnU-Net find our trainers and, where asked for, our predictor (imports nothing heavy).

Bends: ``nnUNet_extTrainer`` of this process, and the function that ``nnUNetv2_predict`` or
    ``nnUNetv2_predict_from_modelfolder`` imports from ``nnunetv2.inference.predict_from_raw_data``.
Why: so that nnU-Net's own commands find the trainers and take ``--missing_modalities`` with no set-up by the user.
Guarded by: tests/upstream/test_registration.py, tests/project/test_packaging.py

The start-up line ``nnunetv2_mgml.pth``, installed beside the package, calls `activate` in every ``nnUNetv2_*`` command
and in no other process. It does two things:

1. ``ext/`` is appended to ``nnUNet_extTrainer``, nnU-Net's own search path for trainers. Child processes inherit it.
2. `nnUNetv2_predict` and `nnUNetv2_predict_from_modelfolder` are handed to `PREDICT_HANDLER` when
   ``--missing_modalities`` or a request for help is among their arguments. Without either, stock code runs.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

EXT_DIR = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "ext")
"""The folder ``nnUNet_extTrainer`` has to name: it holds re-exports only."""

EXT_VARIABLE = "nnUNet_extTrainer"
DISABLE_VARIABLE = "NNUNETV2_MGML_DISABLE"
PTH_NAME = "nnunetv2_mgml.pth"

PREDICT_MODULE = "nnunetv2.inference.predict_from_raw_data"
PREDICT_COMMANDS = {
    "nnUNetv2_predict": "predict_entry_point",
    "nnUNetv2_predict_from_modelfolder": "predict_entry_point_modelfolder",
}
"""Console command -> the function of `PREDICT_MODULE` it calls."""

PREDICT_HANDLER = "nnunetv2_mgml.commands.predict"
"""The module whose ``main`` takes over, by its name: nothing here is built on commands."""

_FLAG = "--missing_modalities"


def activate() -> None:
    """What the start-up line calls. Harmless to call twice: a virtual environment processes its .pth files twice."""
    add_ext_dir()
    entry_point = wanted_entry_point(sys.argv)
    if entry_point is not None and not any(isinstance(finder, _PredictFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PredictFinder(entry_point))


def add_ext_dir() -> None:
    """Append `EXT_DIR` to ``nnUNet_extTrainer`` of this process and its children, once, behind the user's own."""
    folders = os.environ.get(EXT_VARIABLE, "")
    known = {os.path.normcase(os.path.abspath(folder)) for folder in folders.split(os.pathsep) if folder.strip()}
    if os.path.normcase(EXT_DIR) not in known:
        os.environ[EXT_VARIABLE] = f"{folders}{os.pathsep}{EXT_DIR}" if known else EXT_DIR


def command_name(script: str) -> str:
    """Return the console command behind ``sys.argv[0]``; Windows launchers end in ``.exe`` or ``-script.py``."""
    name = os.path.basename(script)
    for ending in (".exe", "-script.py", "-script.pyw"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def wanted_entry_point(argv: list[str]) -> str | None:
    """Return the entry point our predictor must take over, or None where stock code is to run.

    Args:
        argv: the command line as in ``sys.argv``.
    """
    commands = {os.path.normcase(name): entry_point for name, entry_point in PREDICT_COMMANDS.items()}
    entry_point = commands.get(os.path.normcase(command_name(argv[0])))
    ours = any(argument in ("-h", "--help", _FLAG) or argument.startswith(f"{_FLAG}=") for argument in argv[1:])
    return entry_point if ours else None


class _PredictFinder:
    """Waits on ``sys.meta_path`` for the command to import `PREDICT_MODULE`, then makes room for the real finders."""

    def __init__(self, entry_point: str) -> None:
        self.entry_point = entry_point

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PREDICT_MODULE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _PredictLoader(spec.loader, self.entry_point))
        return spec


class _PredictLoader:
    """Runs the real module and then replaces the one function the console script imports from it."""

    def __init__(self, loader: Loader, entry_point: str) -> None:
        self.loader = loader
        self.entry_point = entry_point

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        from importlib import import_module

        entry_point = self.entry_point

        def predict_with_missing_modalities() -> None:
            import_module(PREDICT_HANDLER).main(entry_point)

        # `predict_command.stock_entry_point` finds the stock function here
        predict_with_missing_modalities.__wrapped__ = getattr(module, entry_point)  # type: ignore[attr-defined]  # as functools
        setattr(module, entry_point, predict_with_missing_modalities)
