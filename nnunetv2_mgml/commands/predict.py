"""``nnUNetv2_predict`` and ``nnUNetv2_predict_from_modelfolder`` with our flags.

Upstream's own function runs (`upstream.predict_command`): its parser gets our arguments at the moment it parses, and,
when one of them is used, its predictor is ours, in this process only. Without them stock behaviour is left alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

from nnunetv2_mgml.commands.arguments import TWO_MODELS, add_trust, describe_stock_parser
from nnunetv2_mgml.inference.compiled import BACKENDS
from nnunetv2_mgml.inference.planning import check_places
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.io.targets import removing_if_empty
from nnunetv2_mgml.upstream.plain_errors import PlainError, wants_traceback
from nnunetv2_mgml.upstream.predict_command import Build, intercepted, stock_entry_point
from nnunetv2_mgml.upstream.registration import add_ext_dir
from nnunetv2_mgml.workflows.predict import PredictionRequest, build_predictor, check_request, write_additions

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
_MODEL_BY_NAME = ("-d", "-c", "-tr", "-p")
_EXAMPLE = (
    "Example: nnUNetv2_predict -i IN -o OUT -d 137 -c 3d_fullres -f 0 -tr nnUNetTrainerMGML --missing_modalities t1ce"
)


class _Call:
    """One run of nnU-Net's command, which asks back: for the arguments, then for the predictor.

    Args:
        from_folder: the model is named by its folder.
        at_end: is left when the command is over.
    """

    def __init__(self, from_folder: bool, at_end: ExitStack) -> None:
        self.from_folder, self.at_end = from_folder, at_end
        self.request = PredictionRequest()
        self.predictor: MGMLPredictor | None = None
        self.verbose = False

    def parse(self, parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Build]:
        add_arguments(parser)
        is_ours = parser.prog.startswith("mgml")
        if is_ours:
            _describe(parser, self.from_folder)
        if self.from_folder:
            _refuse_two_models(sys.argv[1:])
        args = parser.parse_args()
        self.request, self.verbose = _request_from(args, is_ours), args.verbose
        check_request(self.request)
        check_places(args.i, args.o, getattr(args, "prev_stage_predictions", None))
        self.at_end.enter_context(removing_if_empty(args.o))  # nnU-Net makes the folder before it looks at anything
        if self.request.uses_our_flags:
            args.save_probabilities |= self.request.save_uncertainty
            _show_log()
        return args, self.build

    def build(self, *args: Any, **kwargs: Any) -> MGMLPredictor:
        self.predictor = build_predictor(self.request, *args, **kwargs)
        return self.predictor

    def finish(self) -> None:
        """Write what was asked for beside the segmentations, and say where it is."""
        if self.predictor is None:
            return
        written = write_additions(self.request, self.predictor)
        if written.previews is not None:
            print(f"{written.num_previews} previews: {written.previews}")
        if written.uncertainty is not None:
            print(f"uncertainty maps: {written.uncertainty}")

    def failures(self) -> str:
        """Return a line for every case that was not predicted, under a heading; empty where there is none."""
        failures = {} if self.predictor is None else self.predictor.failures
        if not failures:
            return ""
        return "\n".join([f"{len(failures)} cases were not predicted:", *(f"  {text}" for text in failures.values())])

    def blames_user(self, error: Exception) -> bool:
        """Whether an error is about the arguments: before it predicts, upstream raises RuntimeError and asserts."""
        started = self.predictor is not None and self.predictor.network is not None
        return not started or (self.request.uses_our_flags and isinstance(error, (ValueError, OSError)))


def _refuse_two_models(arguments: Sequence[str]) -> None:
    """Raise a ValueError where the model is named twice: the parser would take ``-d`` for ``-device``."""
    if any(argument.partition("=")[0] in _MODEL_BY_NAME for argument in arguments):
        raise ValueError(TWO_MODELS)


def _describe(parser: argparse.ArgumentParser, from_folder: bool) -> None:
    """Let the help of nnU-Net's parser speak of ``mgml predict``."""
    describe_stock_parser(
        parser,
        "Predict the cases of a folder with a trained model: of nnUNet_results by its data set (-d, -c, -tr, -p), or "
        "of any folder (-m, without those; mgml predict -m FOLDER -h lists the options then).",
    )
    if not from_folder:
        parser.add_argument("-m", help="Instead of -d, -c, -tr, -p: the folder TRAINER__PLANS__CONFIGURATION itself")


def _request_from(args: argparse.Namespace, is_ours: bool) -> PredictionRequest:
    return PredictionRequest(
        missing_modalities=args.missing_modalities,
        cpu_bfloat16=args.cpu_bfloat16,
        backend=args.backend,
        trust_checkpoint=args.trust_checkpoint,
        preview=args.preview,
        save_uncertainty=args.save_uncertainty,
        keep_probabilities=args.save_probabilities,
        device=args.device,
        folds=args.f,
        step_size=args.step_size,
        part=(getattr(args, "part_id", 0), getattr(args, "num_parts", 1)),
        processes=(args.npp, args.nps),
        checks_input=is_ours,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our arguments to upstream's parser, in a group of their own."""
    group = parser.add_argument_group("missing modalities (nnunetv2_mgml)", _EXAMPLE)
    group.add_argument(
        "--missing_modalities",
        nargs="+",
        metavar="NAME",
        default=None,
        help="Modalities to do without, by their names in dataset.json (t1 = t1n = t1w, t1ce = t1c = "
        "t1gd, t2 = t2w, flair = t2f): they count as missing in every case, whether their files "
        "exist or not. 'auto' goes by the files that exist, case by case. Both may be combined: "
        "--missing_modalities auto t1ce. Needs a model trained for it (nnUNetTrainerMGML).",
    )
    group.add_argument(
        "--cpu_bfloat16",
        action="store_true",
        help="With -device cpu: run the network in bfloat16, faster on CPUs with instructions for it. "
        "nnUNetv2_predict takes it together with --missing_modalities, mgml predict also alone.",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="With -device cpu: openvino compiles the network first (pip install openvino); whether that pays depends "
        "on the processor. Together with --missing_modalities.",
    )
    add_trust(group)
    group.add_argument(
        "--preview",
        action="store_true",
        help="Write OUT/preview/CASE.png: every sequence the case was predicted from, the segmentation over it, its "
        "volumes and the quality to expect. Together with --missing_modalities.",
    )
    group.add_argument(
        "--save_uncertainty",
        action="store_true",
        help="Write OUT/uncertainty/CASE: the entropy of each voxel's own probabilities, 0 sure to 1 undecided; not "
        "calibrated. Together with --missing_modalities.",
    )
    try:
        # --c has always been short for --continue_prediction; our --cpu_bfloat16 would make it ambiguous
        parser.add_argument(
            "--c", dest="continue_prediction", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    except argparse.ArgumentError:  # predict_from_modelfolder spells it out itself
        return


def main(entry_point_name: str) -> NoReturn:
    """Run upstream's entry point on the process's arguments, ours among them, and exit.

    The exit code is 0, or with our flags 1 if a case failed (the others are written) and 2 for a user error.

    Args:
        entry_point_name: ``predict_entry_point`` or ``predict_entry_point_modelfolder``.
    """
    add_ext_dir()
    entry_point, at_end = stock_entry_point(entry_point_name), ExitStack()
    call = _Call(entry_point_name.endswith("modelfolder"), at_end)
    try:
        with at_end, _own_log(), intercepted(call.parse):
            entry_point()
            call.finish()
    except KeyboardInterrupt:
        if not call.request.uses_our_flags:
            raise
        _fail("interrupted; the cases finished so far are complete", _INTERRUPTED)
    except (ValueError, OSError, AssertionError, RuntimeError) as error:
        if not isinstance(error, PlainError) and not call.blames_user(error):
            raise
        if call.verbose or wants_traceback():
            traceback.print_exc()
        _fail("\n".join(filter(None, [str(error), call.failures()])), _USAGE)
    failures = call.failures()
    if failures:
        _fail(failures, _FAILED)
    sys.exit(0)


@contextmanager
def _own_log() -> Iterator[None]:
    """Leave the package's logger as it was."""
    logger = logging.getLogger("nnunetv2_mgml")
    level, handlers = logger.level, list(logger.handlers)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def _show_log() -> None:
    """Print what the package logs, beside what nnU-Net prints."""
    logger = logging.getLogger("nnunetv2_mgml")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)


def _fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main("predict_entry_point_modelfolder" if "-m" in sys.argv else "predict_entry_point")
