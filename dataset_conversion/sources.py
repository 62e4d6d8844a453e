"""Where the cases of a cohort are found: one description for all the forms a cohort can have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_mgml.dataset_conversion.decathlon import find_decathlon
from nnunetv2_mgml.io.case_files import (
    FoundCases,
    find_bids,
    find_brats,
    find_by_patterns,
)
from nnunetv2_mgml.io.case_sheet import SHEET_SUFFIXES, read_sheet
from nnunetv2_mgml.modalities import canonical_name

FORMS = ("folders", "sheet", "bids", "msd")
"""Of cohorts with labels."""


@dataclass(frozen=True)
class CohortSource:
    """Cases somewhere on a disk."""

    path: Path
    """Their folder, or a sheet that lists them."""
    form: str | None = None
    """One of `FORMS`; None: a sheet by its ending, else by ``patterns``, else names as BraTS has them."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Modality -> file name pattern (for BIDS: ending), in channel order."""
    columns: Sequence[str] = ()
    """Of a sheet; none: all there are."""
    known: Sequence[str] = ()
    """Modalities of a data set the cases are for: other columns of a sheet are not read; none: all there are."""
    label: str | None = None
    """File name pattern of the label maps."""
    case_folders: int = 1
    """How many folders below ``path`` name a case."""

    def find(self) -> tuple[FoundCases, dict[str, int]]:
        """Return the cases, and label name -> value where the source says so (MSD), else an empty dict.

        Raises:
            FileNotFoundError: no such folder or sheet.
            ValueError: a source of another form, or without any case; see `io.case_files`, `read_sheet` and
                `find_decathlon`. Or a modality that was asked for and is none of ``known``.
        """
        self._refuse_unknown()
        if self.form == "msd":
            return find_decathlon(self.path)
        if self.form == "bids":
            return find_bids(self.path, dict(self.patterns) or None, self.label), {}
        if self.form == "sheet" or (self.form is None and is_sheet(self.path)):
            return read_sheet(self.path, self.columns, self.known), {}
        if self.form == "folders" or self.patterns:
            return find_by_patterns(self.path, dict(self.patterns), self.label, self.case_folders), {}
        return find_brats(self.path), {}

    def _refuse_unknown(self) -> None:
        """Raise a ValueError where a modality was named that the data set does not have: it would get no channel."""
        spellings = set(map(canonical_name, self.known))
        unknown = [name for name in (*self.patterns, *self.columns) if canonical_name(name) not in spellings]
        if self.known and unknown:
            raise ValueError(
                f"--modalities names {', '.join(unknown)}, which the data set does not have; it has "
                f"{', '.join(self.known)}. Name these, or leave --like out."
            )


def is_sheet(path: Path) -> bool:
    """Return whether a source is a sheet, by its ending, rather than a folder."""
    return path.is_file() and path.suffix.lower() in SHEET_SUFFIXES


def not_of(channels: Sequence[str], found: FoundCases) -> list[str]:
    """Return the modalities of cases that a data set does not have."""
    known = set(map(canonical_name, channels))
    return [name for name in found.modalities if canonical_name(name) not in known]


def in_order(found: FoundCases, channels: Sequence[str]) -> FoundCases:
    """Return the cases with the modalities, and in the order, of a data set; others (`not_of`) are left out.

    Raises:
        ValueError: they have none of these modalities.
    """
    spelled = {canonical_name(name): name for name in found.modalities}
    if not set(spelled) & set(channels):
        raise ValueError(
            f"The cases have {', '.join(found.modalities)}, the data set {', '.join(channels)}: none of it."
        )
    order = tuple(spelled.get(name, name) for name in channels)
    cases = []
    problems = dict(found.problems)
    for case in found.cases:
        images = {name: case.images[name] for name in order if name in case.images}
        if images:
            cases.append(dataclasses.replace(case, images=images))
        else:
            problems[case.name] = [f"has none of {', '.join(channels)}"]
    return dataclasses.replace(found, modalities=order, cases=cases, problems=problems, other_files=found.files())
