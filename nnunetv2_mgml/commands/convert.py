"""The command ``mgml convert``: ``brats``, ``back`` and ``split``; `convert_cohort` adds what knows no BraTS."""

from __future__ import annotations

import argparse

from nnunetv2_mgml.commands import convert_cohort
from nnunetv2_mgml.commands.arguments import add_processes, add_split_lists
from nnunetv2_mgml.dataset_conversion.back import BackRequest, write_back
from nnunetv2_mgml.dataset_conversion.bad_cases import bad_case_lines
from nnunetv2_mgml.dataset_conversion.convert import ConversionRequest, ConversionSummary, convert
from nnunetv2_mgml.dataset_conversion.labels import CONVENTIONS, LABELS
from nnunetv2_mgml.dataset_conversion.missing import parse_rates
from nnunetv2_mgml.dataset_conversion.resplit import SplitRequest, write_split
from nnunetv2_mgml.dataset_conversion.splits import PRESETS, PUBLISHED
from nnunetv2_mgml.modalities import BRATS_CHANNELS
from nnunetv2_mgml.plans.cohort import MISSING_FILE
from nnunetv2_mgml.plans.splits import TEST_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``mgml convert``."""
    commands = parser.add_subparsers(
        dest="what", required=True, metavar=f"{{brats,back,split,{','.join(convert_cohort.COMMANDS)}}}"
    )
    brats = commands.add_parser(
        "brats",
        help="BraTS folder (2018 to 2025) -> nnUNet_raw dataset",
        description="Convert a BraTS folder of any edition from 2018 to 2025 to an nnU-Net raw dataset. The edition is "
        "recognised by the file names. Example: mgml convert brats /data/BraTS2021 -d 137",
        formatter_class=parser.formatter_class,
    )
    brats.add_argument("source", metavar="SRC", help="folder with the cases, at any depth")
    brats.add_argument("-d", type=int, required=True, dest="dataset_id", metavar="ID", help="nnU-Net dataset id")
    brats.add_argument("--name", help="dataset name (default: the edition, such as BraTS2021)")
    how = brats.add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="copy the images (the default)")
    how.add_argument("--link", action="store_true", help="make symbolic links to .nii.gz images instead of copies")
    brats.add_argument(
        "--missing_ok",
        "--missing-ok",
        action="store_true",
        help=f"accept cases that lack sequences: empty volumes, listed in {MISSING_FILE}",
    )
    brats.add_argument(
        "--skip_bad",
        "--skip-bad",
        action="store_true",
        help="convert the good cases although others are bad (exit code 1 then)",
    )
    brats.add_argument(
        "--label_convention",
        "--label-convention",
        choices=("auto", *CONVENTIONS),
        default="auto",
        help="meaning of the label values; auto: told by the file names",
    )
    brats.add_argument(
        "--plain_labels",
        "--plain-labels",
        action="store_true",
        help="learn labels that exclude one another (edema, necrosis, enhancing tumour) instead of the regions WT, TC "
        "and ET, for losses that know no regions (mgml plan --preset reference-losses)",
    )
    _add_split_arguments(brats)
    brats.add_argument(
        "--missing_rate",
        "--missing-rate",
        nargs="+",
        default=[],
        metavar="NAME=RATE",
        help="let training cases of the split lack modalities at these rates, t1=0.2 t1ce=0.4 flair=0.6 t2=0.8 say; "
        f"drawn once per case by --seed, never all, listed in {MISSING_FILE}",
    )
    brats.add_argument(
        "--subset_of",
        "--subset-of",
        nargs="+",
        metavar="NAME",
        help=f"take these sequences only, of {', '.join(BRATS_CHANNELS)}",
    )
    brats.add_argument("--overwrite", action="store_true", help="replace an existing dataset of this id and name")
    add_processes(brats)

    back = commands.add_parser(
        "back",
        help="predictions -> label values of BraTS",
        description="Write predictions with the label values of BraTS; names and geometry stay. "
        "Example: mgml convert back predictions submission --to brats2023",
        formatter_class=parser.formatter_class,
    )
    back.add_argument("source", metavar="SRC", help="folder of predictions")
    back.add_argument("target", metavar="DST", help="folder to write to")
    back.add_argument("--to", choices=CONVENTIONS, required=True, help="label values to write")
    back.add_argument("--overwrite", action="store_true", help="replace files that exist in DST")
    add_processes(back)

    split = commands.add_parser(
        "split",
        help="fixed split for a dataset that is already converted",
        description="Write splits_final.json for an existing dataset; test cases are linked into imagesTs, labelsTs. "
        "Example: mgml convert split -d 137 --split paper2020",
        formatter_class=parser.formatter_class,
    )
    split.add_argument("-d", type=int, required=True, dest="dataset_id", metavar="ID", help="nnU-Net dataset id")
    _add_split_arguments(split)
    split.add_argument("--overwrite", action="store_true", help="replace another existing split")
    convert_cohort.add_arguments(commands, parser.formatter_class)


def _add_split_arguments(parser: argparse.ArgumentParser) -> None:
    presets = ", ".join(f"{name} ({':'.join(map(str, ratio))})" for name, ratio in PRESETS.items())
    parser.add_argument(
        "--split",
        metavar="SPLIT",
        help=f"random train:validation:test split: {presets} or A:B:C; or the very cases of a published one: "
        f"{', '.join(PUBLISHED)}. Test cases go to imagesTs",
    )
    add_split_lists(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``mgml convert`` with parsed arguments.

    Returns:
        Exit code: 0, or 1 when bad cases were skipped.
    """
    if args.what == "brats":
        return _run_brats(args)
    if args.what in convert_cohort.COMMANDS:
        return convert_cohort.run(args)
    if args.what == "back":
        back = BackRequest(args.source, args.target, args.to, args.overwrite, args.num_processes)
        written = write_back(back, progress=True)
        print(f"Wrote {len(written)} segmentation(s) with the values of {args.to} to {args.target}")
        return 0
    split, path = write_split(SplitRequest(args.dataset_id, args.split, args.split_files, args.seed, args.overwrite))
    print(
        f"Wrote {path}: {split}. Train fold 0; the test cases are named in {path.parent / TEST_FILE} and linked into "
        f"imagesTs and labelsTs."
    )
    return 0


def _run_brats(args: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(args).items() if name in ConversionRequest.__dataclass_fields__}
    request = ConversionRequest(missing_rates=parse_rates(args.missing_rate), **given)
    summary = convert(request, progress=True)
    print("\n".join(describe(summary)))
    return 1 if summary.skipped else 0


def describe(summary: ConversionSummary) -> list[str]:
    """Return the report of a conversion, one string a line."""
    lines = [
        f"Recognised: {', '.join(f'{name} ({count} cases)' for name, count in summary.editions.items())}",
        f"Channels: {', '.join(f'{i} {name}' for i, name in enumerate(summary.channels))}",
    ]
    for convention in summary.conventions:
        pairs = [
            f"{value} {label.name} -> {label.nnunet}"
            for label in LABELS
            if label.nnunet in summary.labels and (value := getattr(label, convention)) is not None
        ]
        lines.append(f"Labels ({convention}): {', '.join(pairs)}")
    lines.append(
        f"Cases: {summary.num_training} in imagesTr, {summary.num_held_out} held out in imagesTs and "
        f"labelsTs, {summary.num_unlabelled} without segmentation in imagesTs"
    )
    if summary.missing:
        lines.append(f"Absent sequences in {len(summary.missing)} case(s), listed in {MISSING_FILE}")
    if summary.split is not None:
        lines.append(f"Split: {summary.split}, written to {summary.splits_file}, where nnU-Net reads it. Train fold 0.")
    if summary.left_out:
        lines.append(f"Left out, as no split list names them: {', '.join(summary.left_out)}")
    lines += [f"Note: {note}" for note in summary.notes]
    lines.append(f"Wrote {summary.folder} in {summary.seconds:.1f} s")
    if summary.skipped:
        lines.append(f"Skipped {len(summary.skipped)} bad case(s):")
        lines += bad_case_lines(summary.skipped)
    return lines
