"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunetv2_mgml.commands import TRAINER
from nnunetv2_mgml.io.workers import default_processes
from nnunetv2_mgml.plans.folders import RESULTS, dataset_folder
from nnunetv2_mgml.scoring.sources import PredictionFolders

TWO_MODELS = "Name the model with -d DATASET (and -c, -tr, -p), or with -m MODEL_FOLDER: one of the two."


def describe_stock_parser(parser: argparse.ArgumentParser, description: str) -> None:
    """Make the help of a parser of nnU-Net's speak of our command.

    Args:
        parser: as nnU-Net has built it.
        description: what the command does.
    """
    parser.description = description
    for action in parser._actions:
        if action.dest == "tr":
            action.default = TRAINER
            action.help = (action.help or "").replace("nnUNetTrainer", TRAINER)


def add_trust(parser: argparse._ActionsContainer) -> None:
    """Add ``--trust_checkpoint``."""
    parser.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help="let the model folder run code, as nnU-Net does: only for models of people whose programs you would run",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add ``-np``."""
    parser.add_argument(
        "-np",
        type=int,
        default=default_processes(),
        dest="num_processes",
        metavar="N",
        help="worker processes, 0 or more; 0 and 1: only this one",
    )


def add_split_lists(parser: argparse.ArgumentParser) -> None:
    """Add ``--split_files`` and ``--seed``, which go with ``--split``."""
    parser.add_argument(
        "--split_files",
        "--split-files",
        nargs="+",
        metavar="TXT",
        help="lists of training, validation and test cases, one name a line",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random split")


def changed_options(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None], options: Sequence[str]
) -> list[str]:
    """Return those of some options that are not at their default.

    Args:
        args: what a command was given.
        add_arguments: adds the command's arguments to a parser.
        options: as they are typed, their first names.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    names = [(option, option.lstrip("-")) for option in options]
    return [option for option, name in names if getattr(args, name) != parser.get_default(name)]


def parse_predictions(entries: Sequence[str]) -> PredictionFolders:
    """Parse ``--predictions``: one root whose folders are named by subset, or ``SUBSET=FOLDER`` entries.

    Raises:
        ValueError: an entry of another form, or a subset given twice.
    """
    if len(entries) == 1 and "=" not in entries[0]:
        return Path(entries[0])
    folders: dict[str, Path] = {}
    for entry in entries:
        subset, separator, folder = entry.partition("=")
        if not separator or not folder:
            raise ValueError(f"'{entry}' is not of the form SUBSET=FOLDER, for example t1+flair=/data/predictions.")
        if subset in folders:
            raise ValueError(f"Subset {subset} is given twice: {folders[subset]} and {folder}.")
        folders[subset] = Path(folder)
    return folders


def add_evaluations(parser: argparse.ArgumentParser, which: str) -> None:
    """Add the evaluation folders a command compares, and ``--common_cases``.

    Args:
        parser: of the command.
        which: what the help says of the folders.
    """
    parser.add_argument(
        "evaluations", nargs="+", type=Path, metavar="FOLDER", help=f"folders written by 'mgml evaluate'{which}"
    )
    parser.add_argument("--common_cases", action="store_true", help="compare the shared cases when they differ")


def add_model_choice(parser: argparse.ArgumentParser) -> None:
    """Add ``-d -c -tr -p``, or ``-m``: which trained model a command is about."""
    parser.add_argument("-d", metavar="DATASET", help="id or name of the dataset the model was trained on")
    parser.add_argument("-c", metavar="CONFIGURATION", default="3d_fullres", help="configuration of the model")
    parser.add_argument("-tr", metavar="TRAINER", default=TRAINER, help="trainer of the model")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans of the model")
    parser.add_argument("-m", metavar="MODEL_FOLDER", type=Path, help="instead: TRAINER__PLANS__CONFIGURATION itself")


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add ``-f`` and ``-chk``: which of a model's folds, and which checkpoint of each."""
    parser.add_argument("-f", metavar="FOLD", nargs="+", help="folds; by default every numbered one that is trained")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint")


def refuse_names_beside_folder(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Raise a ValueError where ``-m`` names the model and ``-c``, ``-tr`` or ``-p`` another one.

    Args:
        args: what a command was given.
        add_arguments: adds the command's arguments, at least these four, to a parser.
    """
    given = changed_options(args, add_arguments, ("-c", "-tr", "-p")) if args.m is not None else []
    if given:
        raise ValueError(f"-m names a model already, and {', '.join(given)} would name another. Give one or the other.")


def chosen_model_folder(args: argparse.Namespace) -> Path:
    """Return the model folder that the arguments of `add_model_choice` name.

    Raises:
        ValueError: neither or both are given, or nnUNet_results is not set.
        FileNotFoundError: no such data set.
    """
    if (args.m is None) == (args.d is None):
        raise ValueError(TWO_MODELS)
    refuse_names_beside_folder(args, add_model_choice)
    if args.m is not None:
        return Path(args.m)
    return dataset_folder(args.d, RESULTS) / f"{args.tr}__{args.p}__{args.c}"
