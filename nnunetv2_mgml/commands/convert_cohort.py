"""``mgml convert folders``, ``sheet``, ``bids``, ``msd``, ``raw`` and ``images``: cases of any disease."""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mgml.commands.arguments import add_processes, add_split_lists
from nnunetv2_mgml.dataset_conversion.bad_cases import bad_case_lines
from nnunetv2_mgml.dataset_conversion.cohort import CohortRequest, CohortSummary, convert_cohort, write_images
from nnunetv2_mgml.dataset_conversion.record import record_missing
from nnunetv2_mgml.dataset_conversion.sources import FORMS, CohortSource, in_order, is_sheet, not_of
from nnunetv2_mgml.modalities import canonical_name, channel_names
from nnunetv2_mgml.plans.cohort import MISSING_FILE, read_dataset_json
from nnunetv2_mgml.plans.folders import RAW, dataset_folder

COMMANDS = (*FORMS, "raw", "images")


def add_arguments(commands: Any, formatter_class: Any) -> None:
    """Add the sub-commands.

    Args:
        commands: what ``add_subparsers`` returned.
        formatter_class: of the parser above.
    """

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=summary, description=description, formatter_class=formatter_class
        )
        return parser

    folders = add(
        "folders",
        "folders of any naming, by patterns -> nnUNet_raw dataset",
        "Convert a folder per case, or one folder with all files. What a case lacks gets no file; it is listed in "
        f"{MISSING_FILE}. Example: mgml convert folders /data/ms -d 45 --modalities 't1=*_t1.nii.gz' "
        "'flair=*_fl.nii.gz' --label '*_lesion.nii.gz'",
    )
    folders.add_argument("source", metavar="SRC", help="folder with the cases")
    _add_patterns(folders, "file name pattern of each modality, in channel order: 't1=*_t1.nii.gz' 'flair=*_fl.nii.gz'")
    folders.add_argument("--label", metavar="PATTERN", help="file name pattern of the label maps")
    _add_case_folders(folders)
    _add_dataset(folders)

    sheet = add(
        "sheet",
        "CSV or TSV sheet -> nnUNet_raw dataset",
        "Convert the cases of a sheet with a column 'case', a column of paths per modality (an empty cell: absent), "
        "'label', and 'site' and 'patient' if you like. Example: mgml convert sheet cases.csv -d 45",
    )
    sheet.add_argument("source", metavar="SHEET", help="the sheet; paths are relative to it")
    sheet.add_argument("--modalities", nargs="+", default=[], metavar="COLUMN", help="columns to take (default: all)")
    _add_dataset(sheet)

    bids = add(
        "bids",
        "BIDS data set -> nnUNet_raw dataset",
        "Convert a BIDS data set; label maps are masks in derivatives, unless --label says otherwise. "
        "Example: mgml convert bids /data/bids -d 45",
    )
    bids.add_argument("source", metavar="SRC", help="folder of the BIDS data set")
    _add_patterns(
        bids, "ending of each modality's file names, in channel order: t1=T1w 't1ce=ce-*_T1w' flair=FLAIR", False
    )
    bids.add_argument("--label", metavar="PATTERN", help="file name pattern of the label maps")
    _add_dataset(bids)

    msd = add(
        "msd",
        "Medical Segmentation Decathlon (4-D NIfTI) -> nnUNet_raw dataset",
        "Convert a data set of the Medical Segmentation Decathlon; a modality with one value everywhere is absent. "
        "Example: mgml convert msd /data/Task01_BrainTumour -d 45",
    )
    msd.add_argument("source", metavar="SRC", help="folder with dataset.json, imagesTr, labelsTr")
    _add_dataset(msd)

    raw = add(
        "raw",
        f"existing nnUNet_raw dataset -> {MISSING_FILE} in it",
        "Record which files of an nnU-Net raw data set do not exist or are placeholders (one value everywhere). "
        "Nothing else is written. Example: mgml convert raw -d 45",
    )
    raw.add_argument("-d", required=True, dest="dataset", metavar="DATASET", help="dataset id or name")
    add_processes(raw)

    images = add(
        "images",
        "images without labels -> folder for prediction",
        "Write cases without segmentation, such as a challenge's validation folder, as CASE_XXXX.nii.gz; what a case "
        "lacks gets no file. SRC has BraTS names, is a sheet, or is told by --modalities. Predict with "
        "--missing_modalities auto. Example: mgml convert images /data/BraTS_Validation images",
    )
    images.add_argument("source", metavar="SRC", help="folder with the cases, or a sheet")
    images.add_argument("target", metavar="DST", help="folder to write to")
    _add_patterns(
        images,
        "file name pattern of each modality, in channel order (default: names of BraTS); of a sheet, columns to take",
        False,
    )
    _add_case_folders(images)
    images.add_argument(
        "--like", metavar="DATASET", help="number the channels as this data set does (id, name, or a model's folder)"
    )
    _add_skip_bad(images)
    images.add_argument("--overwrite", action="store_true", help="replace DST")
    add_processes(images)


def _add_patterns(parser: argparse.ArgumentParser, text: str, required: bool = True) -> None:
    parser.add_argument("--modalities", nargs="+", required=required, default=[], metavar="NAME=PATTERN", help=text)


def _add_case_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case_folders",
        "--case-folders",
        type=int,
        default=1,
        metavar="N",
        help="how many folders below SRC name a case: 2 for patient and session (the first one is the patient)",
    )


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", type=int, required=True, dest="dataset_id", metavar="ID", help="nnU-Net dataset id")
    parser.add_argument("--name", help="dataset name (default: that of SRC)")
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="names of the values in the label maps, in the order wanted, ignore last (default: label_1, ... for "
        "what is found)",
    )
    parser.add_argument("--link", action="store_true", help="make symbolic links to .nii.gz images instead of copies")
    _add_skip_bad(parser)
    parser.add_argument(
        "--split",
        metavar="A:B:C",
        help="random train:validation:test split, or the very cases of a published one (see mgml convert brats); test "
        "cases go to imagesTs",
    )
    add_split_lists(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset of this id and name")
    add_processes(parser)


def _add_skip_bad(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip_bad",
        "--skip-bad",
        action="store_true",
        help="convert the good cases although others are bad (exit code 1 then)",
    )


def run(args: argparse.Namespace) -> int:
    """Run one of `COMMANDS`; return 0, or 1 when bad cases were skipped."""
    if args.what == "raw":
        return _run_raw(args)
    if args.what == "images":
        return _run_images(args)
    source, labels = _source(args, args.what), _parse_labels(args.labels)
    found, own_labels = source.find()
    given = {name: value for name, value in vars(args).items() if name in CohortRequest.__dataclass_fields__}
    name = args.name or plain_name(source.path.name.split(".")[0])
    summary = convert_cohort(
        CohortRequest(found, **{**given, "name": name, "labels": labels or own_labels}), progress=True
    )
    print("\n".join(describe(summary)))
    return 1 if summary.skipped else 0


def _source(args: argparse.Namespace, form: str | None, known: Sequence[str] = ()) -> CohortSource:
    path = Path(args.source).expanduser().absolute()
    sheet = form == "sheet" or (form is None and is_sheet(path))
    return CohortSource(
        path=path,
        form=form,
        patterns={} if sheet else parse_patterns(getattr(args, "modalities", ())),
        columns=args.modalities if sheet else (),
        known=known,
        label=getattr(args, "label", None),
        case_folders=getattr(args, "case_folders", 1),
    )


def _run_raw(args: argparse.Namespace) -> int:
    folder = dataset_folder(args.dataset, RAW)
    missing = record_missing(folder, num_processes=args.num_processes, progress=True)
    print(_missing_line(missing) if missing else "No case lacks a modality; nothing was written.")
    if missing:
        print(f"Wrote {folder / MISSING_FILE}. Plan anew with: nnUNetv2_plan_and_preprocess -d {args.dataset} --clean")
    return 0


def _run_images(args: argparse.Namespace) -> int:
    like = _channels_of(args.like) if args.like else ()
    found, _ = _source(args, None, like).find()
    left_out = not_of(like, found) if like else []
    if like:
        found = in_order(found, like)
    written = write_images(
        found,
        Path(args.target),
        skip_bad=args.skip_bad,
        overwrite=args.overwrite,
        num_processes=args.num_processes,
        progress=True,
    )
    print(f"Channels: {', '.join(f'{i} {name}' for i, name in enumerate(found.modalities))}")
    if left_out:
        print(f"Not of {args.like} and left out: {', '.join(left_out)}")
    print(_missing_line({case: names for case, names in written.missing.items() if names}))
    if found.left_over:
        print(_left_over_line([path.relative_to(found.origin) for path in found.left_over]))
    print(f"Wrote {len(written.missing)} case(s) to {args.target}. Predict them with --missing_modalities auto.")
    print("\n".join(_skipped_lines(written.skipped)), end="\n" if written.skipped else "")
    return 1 if written.skipped else 0


def _channels_of(text: str) -> tuple[str, ...]:
    folder = Path(text).expanduser()
    if not (folder / "dataset.json").is_file():
        folder = dataset_folder(text, RAW)
    return channel_names(read_dataset_json(folder))


def parse_patterns(entries: Sequence[str]) -> dict[str, str]:
    """Parse ``["t1=*_t1.nii.gz", ...]``.

    Raises:
        ValueError: an entry of another form, or a modality named twice.
    """
    patterns: dict[str, str] = {}
    for entry in entries:
        name, separator, pattern = entry.partition("=")
        if not separator or not name or not pattern or canonical_name(name) in map(canonical_name, patterns):
            raise ValueError(f"Bad --modalities '{entry}': give each modality once, as in t1=*_t1.nii.gz.")
        patterns[name] = pattern
    return patterns


def _parse_labels(entries: Sequence[str]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name or not value.isdecimal() or name in labels:
            raise ValueError(f"Bad --labels '{entry}': give each name once with a whole number, as in lesion=1.")
        labels[name] = int(value)
    return labels


def describe(summary: CohortSummary) -> list[str]:
    """Return the report of a conversion, one string a line."""
    lines = [
        f"Channels: {', '.join(f'{i} {name}' for i, name in enumerate(summary.channels))}",
        "Labels: " + ", ".join(f"{old} {name} -> {new}" for name, (old, new) in summary.labels.items()),
        f"Cases: {summary.num_training} in imagesTr, {summary.num_test} in imagesTs",
        _missing_line(summary.missing),
    ]
    if summary.left_over:
        lines.append(_left_over_line(summary.left_over))
    if summary.split is not None:
        lines.append(f"Split: {summary.split}, written where nnU-Net reads it. Train fold 0.")
    if summary.left_out:
        lines.append(f"Left out, as no split list names them: {', '.join(summary.left_out)}")
    lines += [f"Note: {note}" for note in summary.notes]
    lines.append(f"Wrote {summary.folder} in {summary.seconds:.1f} s")
    dataset = summary.folder.name[len("Dataset") :].split("_")[0].lstrip("0")
    lines.append(f"Next: mgml check {dataset}, then nnUNetv2_plan_and_preprocess -d {dataset}")
    return lines + _skipped_lines(summary.skipped)


def _skipped_lines(skipped: Mapping[str, Sequence[str]]) -> list[str]:
    if not skipped:
        return []
    return [f"Skipped {len(skipped)} bad case(s):", *bad_case_lines(skipped)]


def plain_name(text: str) -> str:
    """Return the name of a file or folder as nnU-Net's folders take it (``Köln 1`` -> ``Koln_1``)."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", plain)
    return (name if name == text.replace(" ", "_") else name.strip("_")) or "Cohort"


def _left_over_line(paths: Sequence[Path]) -> str:
    shown = ", ".join(path.as_posix() for path in paths[:3])
    return f"Not used, as no pattern matches: {len(paths)} image(s), such as {shown}"


def _missing_line(missing: Mapping[str, Sequence[str]]) -> str:
    if not missing:
        return "Every case has every modality"
    counts = Counter(name for names in missing.values() for name in names)
    return f"{len(missing)} case(s) lack modalities: {', '.join(f'{name} in {n}' for name, n in counts.items())}"
