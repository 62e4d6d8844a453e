"""A mark beside label maps that do not have nnU-Net's values, so that nobody takes them for such (imports no torch).

The same number means different things in nnU-Net's data sets and in two editions of BraTS, and no file says which.
"""

from __future__ import annotations

from pathlib import Path

from nnunetv2_mgml.io.files import read_json, write_json

MARK_FILE = "mgml_labels.json"


def mark(folder: Path, convention: str) -> None:
    """Note in a folder by which convention its label maps were written, for example ``brats2023``."""
    write_json(folder / MARK_FILE, {"convention": convention, "written_by": "mgml convert back"})


def marked(folder: Path) -> str | None:
    """Return the convention a folder is marked with; None where it has no mark.

    Raises:
        ValueError: a mark that cannot be read.
    """
    file = folder / MARK_FILE
    if not file.is_file():
        return None
    content = read_json(file)
    convention = content.get("convention") if isinstance(content, dict) else None
    if not isinstance(convention, str):
        raise ValueError(f'{file} must hold {{"convention": NAME}}. Delete it if the label maps are nnU-Net\'s.')
    return convention


def refuse_marked(folder: Path, needed_for: str) -> None:
    """Raise a ValueError if a folder is marked: its label maps do not have nnU-Net's values.

    Args:
        folder: folder of label maps.
        needed_for: what needs nnU-Net's values, for the message.
    """
    convention = marked(folder)
    if convention is not None:
        raise ValueError(
            f"The label maps in {folder} have the values of {convention} ({MARK_FILE}, written by mgml convert back), "
            f"not nnU-Net's, which {needed_for} needs. Give the folder they were made from."
        )
