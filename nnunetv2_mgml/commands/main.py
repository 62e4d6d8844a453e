"""The `mgml` command: a thin shell that imports only the module of the command asked for."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import sys
from typing import NamedTuple

from nnunetv2_mgml import __version__
from nnunetv2_mgml.commands import TRAINER
from nnunetv2_mgml.upstream.plain_errors import PlainError, tell


class _Command(NamedTuple):
    module: str
    summary: str
    example: str


COMMANDS: dict[str, _Command] = {
    "convert": _Command(
        "nnunetv2_mgml.commands.convert",
        "BraTS, BIDS, MSD, any folders or a sheet to nnUNet_raw datasets; predictions back; splits",
        "mgml convert brats /path/to/BraTS -d 137",
    ),
    "check": _Command(
        "nnunetv2_mgml.commands.check",
        "what a data set has and lacks: combinations, outliers, copies, coverage, headers",
        "mgml check 137 -o check_of_137",
    ),
    "preprocess": _Command(
        "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
        "nnUNetv2_plan_and_preprocess, which knows missing modalities also where start-up lines are off",
        "mgml preprocess -d 137 -c 3d_fullres",
    ),
    "plan": _Command(
        "nnunetv2_mgml.commands.plan",
        "set options: write plans of their own beside nnU-Net's",
        "mgml plan -d 137 --set fusion=mean num_epochs=300",
    ),
    "train": _Command(
        "nnunetv2_mgml.commands.train",
        f"nnUNetv2_train, with -tr {TRAINER} unless another is given",
        "mgml train 137 3d_fullres 0",
    ),
    "warmstart": _Command(
        "nnunetv2_mgml.commands.warmstart",
        "weights to start a training from: of a stock nnU-Net, of another model, self-supervised",
        "mgml warmstart checkpoint_final.pth -d 137 -c 3d_fullres -o start.pth",
    ),
    "predict": _Command(
        "nnunetv2_mgml.commands.predict",
        f"nnUNetv2_predict (with -m: nnUNetv2_predict_from_modelfolder), -tr {TRAINER} unless given",
        "mgml predict -i IN -o OUT -d 137 -c 3d_fullres -f 0 --missing_modalities t1ce",
    ),
    "evaluate": _Command(
        "nnunetv2_mgml.commands.evaluate",
        "score a model on every subset of its modalities",
        "mgml evaluate -d 137 -c 3d_fullres -f 0",
    ),
    "compare": _Command(
        "nnunetv2_mgml.commands.compare",
        "compare evaluations of several models",
        "mgml compare evaluation_of_baseline evaluation_of_mgml -o comparison",
    ),
    "find-best": _Command(
        "nnunetv2_mgml.commands.find_best",
        "choose configuration and post-processing over all subsets",
        "mgml find-best evaluation_of_2d evaluation_of_3d_fullres -o best",
    ),
    "report": _Command(
        "nnunetv2_mgml.commands.report",
        "one HTML page with tables and figures of an evaluation",
        "mgml report evaluation_of_mgml -i imagesTr",
    ),
    "export-model": _Command(
        "nnunetv2_mgml.commands.export_model",
        "one zip with a model, its expected quality and a model card, to be installed elsewhere",
        "mgml export-model -d 137 -c 3d_fullres -o model.zip --license CC-BY-4.0",
    ),
    "export-network": _Command(
        "nnunetv2_mgml.commands.export_network",
        "a trained network as ONNX and OpenVINO files, what is visible as an input, checked against PyTorch",
        "mgml export-network -d 137 -c 3d_fullres -o network",
    ),
    "demo": _Command(
        "nnunetv2_mgml.commands.demo",
        "convert, plan, train, predict and evaluate synthetic cases, on a CPU",
        "mgml demo -o demo",
    ),
    "info": _Command(
        "nnunetv2_mgml.commands.info", "versions, folders, options, fusion designs", "mgml info --options"
    ),
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something: not None, and not the False of a flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def overview() -> str:
    """Return the text of ``mgml --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mgml COMMAND [...]",
            "",
            "nnU-Net v2 with missing modalities. COMMAND is one of",
            "",
            *lines,
            "",
            "mgml COMMAND -h lists the options of a command; mgml --version prints the version.",
            f"example: {COMMANDS['predict'].example}",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run ``mgml``.

    Args:
        argv: arguments without the program name; ``sys.argv`` by default.

    Returns:
        The exit code; 2 for a mistake in the arguments or the files they name.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal, or UTF-8, cannot show
            stream.reconfigure(errors="backslashreplace")
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"mgml {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command '{name}'. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if name in ("train", "predict", "preprocess"):
        return _run_nnunet_like(name, rest)
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("nnunetv2_mgml").setLevel(logging.INFO)
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"mgml {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"example: {command.example}",
        formatter_class=_HelpFormatter,
    )
    module.add_arguments(parser)
    try:
        return int(module.run(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        tell(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run_nnunet_like(name: str, arguments: list[str]) -> int:
    """Run a command that parses ``sys.argv`` itself, as nnU-Net's entry points do."""
    from nnunetv2_mgml.upstream.registration import PREPROCESS_MODULE, add_ext_dir, install_preprocessing

    add_ext_dir()
    from_model_folder = name == "predict" and _given("-m", arguments)
    if name == "preprocess":
        install_preprocessing(importlib.import_module(PREPROCESS_MODULE))
    elif not from_model_folder and not _given("-tr", arguments):
        arguments = [*arguments, "-tr", TRAINER]
    sys.argv = [f"mgml {name}", *arguments]
    module = importlib.import_module(COMMANDS[name].module)
    try:
        if name == "train":
            return int(module.main(arguments))
        if name == "preprocess":
            module.plan_and_preprocess_entry()
        else:
            module.main("predict_entry_point_modelfolder" if from_model_folder else "predict_entry_point")
    except PlainError as error:
        tell(error)
        return 2
    return 0


def _given(option: str, arguments: list[str]) -> bool:
    return any(argument == option or argument.startswith(f"{option}=") for argument in arguments)


if __name__ == "__main__":
    sys.exit(main())
