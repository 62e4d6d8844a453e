"""nnU-Net's predict commands with arguments and a predictor of ours, and the parser of its training command.

Bends: ``argparse.ArgumentParser.parse_args`` and the name ``nnUNetPredictor`` in
    ``nnunetv2.inference.predict_from_raw_data``, each for the next call only, while ``predict_entry_point`` or
    ``predict_entry_point_modelfolder`` runs; the parser also while ``run_training_entry`` runs.
Why: these entry points build their parser and their predictor inside one function that takes neither.
Guarded by: tests/upstream/test_inference_drift.py, tests/commands/test_predict_command.py,
    tests/commands/test_train_command.py
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nnunetv2.inference import predict_from_raw_data as upstream

Build = Callable[..., Any]
"""Takes the arguments of ``nnUNetPredictor`` and returns a predictor."""


def stock_entry_point(name: str) -> Callable[[], None]:
    """Return nnU-Net's own function, also where the start-up line has put a function that calls us in its place.

    Args:
        name: ``predict_entry_point`` or ``predict_entry_point_modelfolder``.
    """
    entry_point: Callable[[], None] = inspect.unwrap(getattr(upstream, name))
    return entry_point


@contextmanager
def intercepted(parse: Callable[[argparse.ArgumentParser], tuple[argparse.Namespace, Build | None]]) -> Iterator[None]:
    """Let ``parse`` handle the next parser of this process, and what it returns build the next predictor.

    Args:
        parse: takes nnU-Net's parser; returns the parsed arguments, and what to build the predictor with (None: as
            nnU-Net does).
    """
    stock_parse, stock_class = argparse.ArgumentParser.parse_args, upstream.nnUNetPredictor

    def restore() -> None:
        argparse.ArgumentParser.parse_args = stock_parse  # type: ignore[method-assign]  # what this file is for
        upstream.nnUNetPredictor = stock_class

    @functools.wraps(stock_parse)
    def parse_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.Namespace:
        restore()
        namespace, build = parse(parser)
        if build is not None:

            def build_once(*args: Any, **kwargs: Any) -> Any:
                restore()
                return build(*args, **kwargs)

            upstream.nnUNetPredictor = build_once
        return namespace

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[assignment,method-assign]  # what this file is for
    try:
        yield
    finally:
        restore()
