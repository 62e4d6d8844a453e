"""Makes nnU-Net find our trainers and, where asked for, our predictor and preprocessing (imports nothing heavy).

Bends: ``nnUNet_extTrainer`` of this process, the function that ``nnUNetv2_predict`` or
    ``nnUNetv2_predict_from_modelfolder`` imports from ``nnunetv2.inference.predict_from_raw_data``, and what
    `incomplete_data` bends in the commands that plan and preprocess.
Why: so that nnU-Net's own commands find the trainers, take ``--missing_modalities`` and preprocess data sets in which
    files are absent, with no set-up by the user.
Guarded by: tests/upstream/test_registration.py, tests/project/test_packaging.py

The start-up line ``nnunetv2_mgml.pth``, installed beside the package, calls `activate` in every ``nnUNetv2_*`` command
and in no other process. It does four things:

1. ``ext/`` is appended to ``nnUNet_extTrainer``, nnU-Net's own search path for trainers. Child processes inherit it.
2. `nnUNetv2_predict` and `nnUNetv2_predict_from_modelfolder` are handed to `PREDICT_HANDLER` when
   ``--missing_modalities`` or a request for help is among their arguments. Without either, stock code runs.
3. In the commands that take a fingerprint, plan or preprocess, `incomplete_data.install` stands in front of nnU-Net's
   steps. It leaves every data set to stock code in which no case lacks a modality.
4. A mistake that our code has found (`plain_errors.PlainError`) is printed in one line, without traceback.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
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

PREPROCESS_MODULE = "nnunetv2.experiment_planning.plan_and_preprocess_api"
PREPROCESS_COMMANDS = (
    "nnUNetv2_plan_and_preprocess",
    "nnUNetv2_extract_fingerprint",
    "nnUNetv2_plan_experiment",
    "nnUNetv2_preprocess",
)
PREPROCESS_HANDLER = "nnunetv2_mgml.upstream.incomplete_data"
"""The module whose ``install`` is called with `PREPROCESS_MODULE`."""

_FLAG = "--missing_modalities"


def activate() -> None:
    """What the start-up line calls. Harmless to call twice: a virtual environment processes its .pth files twice."""
    from nnunetv2_mgml.upstream.plain_errors import install

    add_ext_dir()
    install()
    wanted = wanted_change(sys.argv)
    if wanted is not None and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(*wanted))


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


def wanted_change(argv: list[str]) -> tuple[str, Callable[[ModuleType], None]] | None:
    """Return the module of nnU-Net that a command line wants changed, and what changes it; None for stock code.

    Args:
        argv: the command line as in ``sys.argv``.
    """
    entry_point = wanted_entry_point(argv)
    if entry_point is not None:
        return PREDICT_MODULE, lambda module: _hand_over(module, entry_point)
    name = os.path.normcase(command_name(argv[0]))
    if name in map(os.path.normcase, PREPROCESS_COMMANDS):
        return PREPROCESS_MODULE, install_preprocessing
    return None


def install_preprocessing(module: ModuleType) -> None:
    """Let nnU-Net's fingerprint and preprocessing know missing modalities.

    Args:
        module: `PREPROCESS_MODULE`, imported.
    """
    from importlib import import_module

    import_module(PREPROCESS_HANDLER).install(module)


def _hand_over(module: ModuleType, entry_point: str) -> None:
    """Replace the one function that the console script imports from `PREDICT_MODULE`."""
    from importlib import import_module

    def predict_with_missing_modalities() -> None:
        import_module(PREDICT_HANDLER).main(entry_point)

    # `predict_command.stock_entry_point` finds the stock function here
    predict_with_missing_modalities.__wrapped__ = getattr(module, entry_point)  # type: ignore[attr-defined]  # as functools
    setattr(module, entry_point, predict_with_missing_modalities)


class _Finder:
    """Waits on ``sys.meta_path`` for the command to import a module, then makes room for the real finders."""

    def __init__(self, module: str, change: Callable[[ModuleType], None]) -> None:
        self.module = module
        self.change = change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _Loader(spec.loader, self.change))
        return spec


class _Loader:
    """Runs the real module and then changes it."""

    def __init__(self, loader: Loader, change: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.change = change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.change(module)
