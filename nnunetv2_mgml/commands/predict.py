"""``nnUNetv2_predict`` and ``nnUNetv2_predict_from_modelfolder`` with our flags.

Upstream's own function runs (`upstream.predict_command`): its parser gets our arguments at the moment it parses, and,
when one of them is used, its predictor is ours, in this process only. Without them stock behaviour is left alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from nnunetv2_mgml.commands.arguments import add_trust
from nnunetv2_mgml.inference.arguments import check_device, check_folds, check_step_size
from nnunetv2_mgml.inference.compiled import BACKENDS
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.inference.uncertainty import FOLDER as UNCERTAINTY_FOLDER
from nnunetv2_mgml.inference.uncertainty import write_uncertainty
from nnunetv2_mgml.upstream.plain_errors import PlainError
from nnunetv2_mgml.upstream.predict_command import Build, intercepted, stock_entry_point
from nnunetv2_mgml.upstream.registration import add_ext_dir

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
_EXAMPLE = (
    "Example: nnUNetv2_predict -i IN -o OUT -d 137 -c 3d_fullres -f 0 -tr nnUNetTrainerMGML --missing_modalities t1ce"
)


class _Session:
    """What one command asked for and made."""

    def __init__(self) -> None:
        self.args: argparse.Namespace | None = None
        self.predictor: MGMLPredictor | None = None
        self.keep_probabilities = True

    @property
    def ours(self) -> bool:
        if self.args is None:
            return False
        return (
            self.args.missing_modalities is not None
            or self.args.cpu_bfloat16
            or self.args.backend != BACKENDS[0]
            or self.args.preview
            or self.args.save_uncertainty
        )

    def parse(self, parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Build | None]:
        add_arguments(parser)
        self.args = parser.parse_args()
        if not self.ours:
            return self.args, self.build  # nnU-Net's prediction by a predictor that reads files of strangers as data
        for option in ("preview", "save_uncertainty", "backend"):
            if getattr(self.args, option) not in (False, BACKENDS[0]) and self.args.missing_modalities is None:
                raise ValueError(f"--{option} needs --missing_modalities; 'auto' goes by the files that exist.")
        if self.args.save_uncertainty:
            self.keep_probabilities = self.args.save_probabilities
            self.args.save_probabilities = True
        check_folds(self.args.f)
        check_step_size(self.args.step_size)
        _show_log()
        return self.args, self.build

    def build(self, *args: Any, **kwargs: Any) -> MGMLPredictor:
        assert self.args is not None
        self.predictor = MGMLPredictor(
            *args,
            missing_modalities=self.args.missing_modalities,
            cpu_bfloat16=self.args.cpu_bfloat16,
            backend=self.args.backend,
            trust_checkpoint=self.args.trust_checkpoint,
            **kwargs,
        )
        check_device(self.args.device)
        # upstream forgets -part_id and -num_parts when -npp 0 -nps 0 make it run without worker processes
        self.predictor.sequential_part = (getattr(self.args, "part_id", 0), getattr(self.args, "num_parts", 1))
        return self.predictor

    def draw(self) -> None:
        """Draw the cases that this call has predicted, where that was asked for."""
        if self.args is None or not self.args.preview or self.predictor is None or self.predictor.report_file is None:
            return
        from nnunetv2_mgml.presentation.preview import FOLDER, write_previews  # matplotlib is slow to import

        report = self.predictor.report_file
        written, _ = write_previews(report, self.predictor.dataset_json, self.predictor.report_cases)
        print(f"{len(written)} previews: {report.parent / FOLDER}")

    def save_uncertainty(self) -> None:
        """Write the maps of the cases that this call has predicted, where that was asked for."""
        predictor = self.predictor
        if self.args is None or not self.args.save_uncertainty or predictor is None or predictor.report_file is None:
            return
        folder, ending = predictor.report_file.parent, predictor.dataset_json["file_ending"]
        for case in predictor.report_cases:
            if case in predictor.failures:
                continue
            try:
                write_uncertainty(folder, case, ending, predictor.label_manager.has_regions)
            except (ValueError, OSError) as error:  # the segmentation is there; the others' maps can still be written
                predictor.failures[case] = str(error)
            if not self.keep_probabilities:
                for suffix in (".npz", ".pkl"):
                    (folder / f"{case}{suffix}").unlink(missing_ok=True)
        print(f"uncertainty maps: {folder / UNCERTAINTY_FOLDER}")


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
        help="With -device cpu: openvino compiles the network first, which pays from the first case of usual size on "
        "(pip install openvino). Together with --missing_modalities.",
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
    session = _Session()
    entry_point = stock_entry_point(entry_point_name)
    try:
        with _own_log(), intercepted(session.parse):
            entry_point()
            session.draw()
            session.save_uncertainty()
    except KeyboardInterrupt:
        if not session.ours:
            raise
        _fail("interrupted; the cases finished so far are complete", _INTERRUPTED)
    except (ValueError, OSError, AssertionError, RuntimeError) as error:
        if not isinstance(error, PlainError) and not _by_user(error, session):
            raise
        if session.args is not None and session.args.verbose:
            traceback.print_exc()
        _fail("\n".join(filter(None, [str(error), _failures(session)])), _USAGE)
    failures = _failures(session)
    if failures:
        _fail(failures, _FAILED)
    sys.exit(0)


def _failures(session: _Session) -> str:
    """Return a line for every case that was not predicted, under a heading; empty where there is none."""
    failures = {} if session.predictor is None else session.predictor.failures
    if not failures:
        return ""
    return "\n".join([f"{len(failures)} cases were not predicted:", *(f"  {text}" for text in failures.values())])


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


def _by_user(error: Exception, session: _Session) -> bool:
    """Whether an exception is about the arguments: before it predicts, upstream raises RuntimeError and asserts."""
    loading = session.predictor is not None and session.predictor.network is None
    if not session.ours:
        return loading and isinstance(error, (ValueError, OSError))
    started = session.predictor is not None and not loading
    return isinstance(error, (ValueError, OSError)) or not started


def _fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main("predict_entry_point_modelfolder" if "-m" in sys.argv else "predict_entry_point")
