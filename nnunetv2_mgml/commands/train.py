"""``mgml train``: ``nnUNetv2_train`` with our trainer as the default, which tells mistakes in one line.

nnU-Net's own function runs; its parser is asked for the arguments first, and what can be wrong with them is checked
before anything is built. What else is raised before the first epoch is told likewise.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_mgml.commands.arguments import describe_stock_parser
from nnunetv2_mgml.training.preflight import TrainingRequest, check_training
from nnunetv2_mgml.upstream.distributed import process_group
from nnunetv2_mgml.upstream.first_epoch import noticed
from nnunetv2_mgml.upstream.plain_errors import TRACEBACK_VARIABLE, PlainError, tell
from nnunetv2_mgml.upstream.predict_command import Build, intercepted

_RUN = "nnunetv2.run.run_training"
_USAGE = 2


def main(arguments: Sequence[str]) -> int:
    """Train as nnU-Net's command does with the process's arguments.

    Args:
        arguments: those of ``sys.argv``, without the program's name.

    Returns:
        The exit code: 0, or 2 where nothing could be trained. What fails later is raised.
    """
    with noticed() as training:
        try:
            with process_group(arguments), intercepted(_parse):
                importlib.import_module(_RUN).run_training_entry()
        except (ValueError, OSError, AssertionError, RuntimeError) as error:
            if training.begun and not isinstance(error, PlainError):
                raise
            tell(error)
            if not isinstance(error, (ValueError, OSError)):  # not one of ours: it may be a fault
                print(f"({TRACEBACK_VARIABLE}=1 shows where it was raised.)", file=sys.stderr)
            return _USAGE
    return 0


def _parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Build | None]:
    describe_stock_parser(
        parser,
        "Train one model for all subsets of the modalities, as nnUNetv2_train does and with its arguments; options of "
        "ours are set in plans (mgml plan).",
    )
    args = parser.parse_args()
    check_training(
        TrainingRequest(
            dataset=args.dataset_name_or_id,
            configuration=args.configuration,
            fold=args.fold,
            trainer=args.tr,
            plans=args.p,
            device=args.device,
            num_gpus=args.num_gpus,
            pretrained_weights=None if args.pretrained_weights is None else Path(args.pretrained_weights),
            resume=args.c,
            only_validate=args.val,
            validate_best=args.val_best,
            no_checkpoints=args.disable_checkpointing,
        )
    )
    return args, None
