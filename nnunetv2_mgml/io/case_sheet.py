"""Cases by a CSV or TSV sheet with a row per case (imports neither nnU-Net nor torch)."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2_mgml.io.case_files import CaseFiles, FoundCases, ending_in_name
from nnunetv2_mgml.modalities import canonical_name

SHEET_SUFFIXES = (".csv", ".tsv")
_ABSENT = ("", "n/a", "#n/a", "na", "n.a.", "nan", "none", "null", "-", "--", ".")
_NO_MODALITY = ("case", "label", "site", "patient")


def read_sheet(path: Path, modalities: Sequence[str] = (), known: Sequence[str] = ()) -> FoundCases:
    """Read a CSV or TSV sheet with a row per case.

    Columns: ``case``; ``label``, ``site`` and ``patient`` where there are such; every other one is a modality, in
    channel order. Cases of one ``patient`` stay together in a random split.
    A cell holds a path (relative to the sheet), or nothing, ``n/a`` or the like (`_ABSENT`) where a modality is absent.

    Args:
        path: the sheet; separated by commas, semicolons or tabs.
        modalities: columns to take, in channel order; none for all.
        known: modalities whose cells are read; none for all. Others are named, but in no case.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such sheet.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Sheet {path} does not exist.")
    header, rows = _rows(path)
    columns = {name.strip().lower(): name for name in (rows[0] if rows else ()) if name and name.strip()}
    if "case" not in columns:
        raise ValueError(f"{path} needs a column 'case' and rows below it; its first line is '{header}'.")
    own = [name for low, name in columns.items() if low not in _NO_MODALITY]
    by_name = {canonical_name(name): name for name in own}
    unknown = [name for name in modalities if canonical_name(name) not in by_name]
    if unknown:
        raise ValueError(f"{path} has no column {', '.join(unknown)}; its columns are {', '.join(columns.values())}.")
    chosen = {name: by_name[canonical_name(name)] for name in modalities} or {name.strip(): name for name in own}
    named = tuple(chosen)
    if known:
        spellings = set(map(canonical_name, known))
        chosen = {name: column for name, column in chosen.items() if canonical_name(name) in spellings}
    cells = [{key: (value or "").strip() for key, value in row.items() if isinstance(key, str)} for row in rows]
    cells = [row for row in cells if any(row.values())]
    _refuse_line_breaks(path, [*(columns[name] for name in _NO_MODALITY if name in columns), *chosen.values()], cells)
    _check_columns(path, chosen, cells)
    result = FoundCases(named, origin=str(path))
    count = Counter(row[columns["case"]] for row in cells)
    for row in cells:
        name = row[columns["case"]]
        images = {what: _below(path.parent, row[c]) for what, c in chosen.items() if not _is_absent(row[c])}
        label = row[columns["label"]] if "label" in columns else ""
        case = CaseFiles(
            name,
            images,
            None if _is_absent(label) else _below(path.parent, label),
            _text(row, columns, "site"),
            patient=_text(row, columns, "patient"),
        )
        if not name:
            raise ValueError(f"{path} has a row without a case name: {', '.join(filter(None, row.values()))[:80]}.")
        texts = [f"{file} does not exist" for file in (*images.values(), case.label) if file and not _is_file(file)]
        if name.startswith(".") or "/" in name or "\\" in name:
            texts.append("its name would name another folder; leave slashes and the dot in front out")
        if text := ending_in_name(name):
            texts.append(text)
        if count[name] > 1:
            texts.append(f"is in {'two' if count[name] == 2 else count[name]} rows")
        if not images:
            texts.append("has no image")
        texts += [
            f"{first} and {second} are the same file, {images[first]}"
            for first, second in itertools.combinations(images, 2)
            if images[first] == images[second]
        ]
        if texts:
            texts = [text for text in texts if text not in result.problems.get(name, ())]
            result.problems.setdefault(name, []).extend(texts)
            result.other_files += filter(None, (*images.values(), case.label))
        else:
            result.cases.append(case)
    result.cases.sort(key=lambda case: case.name)
    return result


def _rows(path: Path) -> tuple[str, list[dict[str, str]]]:
    """Return the first line of a sheet, and its rows: column -> cell as it is written."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}). Save it as CSV in UTF-8.") from error
    first, _, rest = text.partition("\n")
    above = 0
    if first.lower().startswith("sep="):  # a line for Excel alone
        text, first, above = rest, rest.partition("\n")[0], 1
    header = first.strip()
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max("\t;,", key=header.count), strict=True)
    rows, last = [], 0
    try:
        _refuse_doubles(path, reader.fieldnames or ())
        for row in reader:
            rows.append(row)
            last = reader.line_num
    except csv.Error as error:
        raise ValueError(
            f"{path} cannot be read from line {above + last + 1} on ({error}). Most likely a quotation mark is not "
            f"closed there, and would swallow the rows below it."
        ) from error
    return header, rows


def _refuse_doubles(path: Path, header: Sequence[str]) -> None:
    """Refuse two columns of one name, of which one would be lost; upper and lower case count as the same."""
    names = [name.strip().lower() for name in header]
    doubles = dict.fromkeys(name for name in names if name and names.count(name) > 1)
    if doubles:
        raise ValueError(
            f"{path} has more than one column {', '.join(doubles)} (upper and lower case are the same); only one could "
            f"be read. Rename or remove the others."
        )


def _refuse_line_breaks(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Refuse cells over several lines, which are rows swallowed by a quotation mark rather than names and paths."""
    for row in rows:
        for column in columns:
            if "\n" in row[column]:
                raise ValueError(
                    f"{path}: a cell of {column} has a line break, {row[column][:80]!r}. Most likely a quotation mark "
                    f"is not closed there; if the line break is meant, take it out."
                )


def _check_columns(path: Path, chosen: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> None:
    """Refuse columns of several values of which none is a file: age, sex, a comment; or a sheet that was moved."""
    given = {what: [row[column] for row in rows if not _is_absent(row[column])] for what, column in chosen.items()}
    files = {what: [text for text in texts if _is_file(_below(path.parent, text))] for what, texts in given.items()}
    strange = [what for what, texts in given.items() if len(texts) > 1 and not files[what]]
    images = [what for what in chosen if what not in strange and given[what]]
    if strange and images:
        raise ValueError(
            f"{path}: no cell of {', '.join(strange)} is a file that exists (the first: {given[strange[0]][0]!r}; "
            f"paths are relative to the sheet). If it is no modality, name those to take: --modalities "
            f"{' '.join(images)}."
        )
    if strange:
        raise ValueError(
            f"{path}: none of its files exists, the first is {_below(path.parent, given[strange[0]][0])}. Paths are "
            f"relative to the sheet's folder, {path.parent}."
        )


def _text(row: Mapping[str, str], columns: Mapping[str, str], name: str) -> str | None:
    """Return what a row says in a column that a sheet may have; None where it says nothing."""
    text = row[columns[name]] if name in columns else ""
    return None if _is_absent(text) else text


def _is_absent(text: str) -> bool:
    return text.lower() in _ABSENT


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a comment that is too long for a name
        return False


def _below(folder: Path, text: str) -> Path:
    r"""Return the file a cell names; backslashes of a sheet written on Windows are slashes, if only so it exists."""
    path = folder / Path(text).expanduser()  # an absolute path stays what it is
    turned = folder / Path(text.replace("\\", "/")).expanduser()
    return turned if turned != path and not _is_file(path) and _is_file(turned) else path
