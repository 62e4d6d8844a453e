"""What is installed here, and whether nnU-Net's commands find it (imports neither torch nor nnU-Net)."""

from __future__ import annotations

import os
import platform
import site
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nnunetv2_mgml import __version__
from nnunetv2_mgml.plans.folders import VARIABLES
from nnunetv2_mgml.upstream.registration import DISABLE_VARIABLE, EXT_DIR, EXT_VARIABLE, PTH_NAME


@dataclass(frozen=True)
class Installation:
    """Versions, folders, the start-up line and nnU-Net's variables."""

    versions: dict[str, str | None]
    """Package -> version; None where it is not installed."""
    start_up_file: str | None
    """The installed .pth file that this Python reads at start-up."""
    disabled: bool
    """Whether the user has switched it off."""
    environment: dict[str, str | None]
    """Variable of nnU-Net -> value; None where it is not set."""

    @property
    def active(self) -> bool:
        """Whether ``nnUNetv2_*`` commands find the trainers by themselves."""
        return self.start_up_file is not None and not self.disabled

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, JSON-ready."""
        return {
            "versions": self.versions,
            "ext_dir": EXT_DIR,
            "start_up_line": {"file": self.start_up_file, "disabled": self.disabled, "active": self.active},
            "environment": self.environment,
        }


def find_installation() -> Installation:
    """Look at this Python and its environment."""
    return Installation(
        versions={
            "nnunetv2_mgml": __version__,
            "python": platform.python_version(),
            **{name: _installed_version(name) for name in ("nnunetv2", "torch")},
        },
        start_up_file=start_up_file(),
        disabled=os.environ.get(DISABLE_VARIABLE) == "1",
        environment={name: os.environ.get(name) for name in (*VARIABLES, EXT_VARIABLE)},
    )


def start_up_file() -> str | None:
    """Return the installed .pth file that this Python reads at start-up, or None."""
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    files = [os.path.join(folder, PTH_NAME) for folder in folders]
    return next((file for file in files if os.path.isfile(file)), None)


def export_line() -> str:
    """Return the shell line that replaces the start-up line; on Windows for PowerShell."""
    present = os.environ.get(EXT_VARIABLE, "")
    folders = [folder for folder in present.split(os.pathsep) if folder and folder != EXT_DIR]
    setting = f'{EXT_VARIABLE}="{os.pathsep.join([*folders, EXT_DIR])}"'
    return f"$env:{setting}" if sys.platform == "win32" else f"export {setting}"


def _installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
