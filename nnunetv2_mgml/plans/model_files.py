"""What ``plans.json`` and ``dataset.json`` of a model folder must hold before anything is built from them.

Plans name classes and functions, which nnU-Net imports and calls with arguments that the plans hold as well. Here they
may name parts of nnU-Net, of dynamic_network_architectures, of PyTorch's layers and of this package, of the kind that
belongs there, and nothing else.
"""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.modalities import channel_names

_NETWORKS = ("dynamic_network_architectures.", "nnunetv2_mgml.", "nnunetv2.")
_LAYERS = ("torch.nn.", *_NETWORKS)
_ARCHITECTURE = "architecture"
_LARGEST = 4096
"""Of patch sizes, spacings and batch sizes: more is no plan of anybody."""
_RESAMPLING = ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities")


def read_model_files(folder: Path, trust: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and check ``plans.json`` and ``dataset.json`` of a model folder.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION``.
        trust: let the plans name any class there is.

    Returns:
        Plans and dataset.json.

    Raises:
        FileNotFoundError: one of them does not exist.
        ValueError: what they hold is of another kind than it must be, or a class that may not be named; one line that
            names the file and the entry.
    """
    plans, dataset_json = (read_json(folder / name) for name in ("plans.json", "dataset.json"))
    try:
        check_dataset_json(dataset_json)
    except ValueError as error:
        raise ValueError(f"{folder / 'dataset.json'}: {error}") from error
    try:
        check_plans(plans, len(channel_names(dataset_json)), trust)
    except ValueError as error:
        raise ValueError(f"{folder / 'plans.json'}: {error}") from error
    return plans, dataset_json


def previous_stage(model_folder: Path) -> Path | None:
    """Return the model that predicts a cascade's first stage; None for other models, and where the plans are gone."""
    head, _, configuration = model_folder.name.rpartition("__")
    plans = model_folder / "plans.json"
    configurations = read_json(plans).get("configurations", {}) if plans.is_file() else {}
    stage = configurations.get(configuration, {}).get("previous_stage")
    return model_folder.with_name(f"{head}__{stage}") if stage else None


def check_dataset_json(content: Any) -> None:
    """Raise a ValueError unless a ``dataset.json`` has channels, labels and a file ending of the right kind."""
    _need(isinstance(content, dict), "the file", content, "an object")
    channel_names(content)
    labels = content.get("labels")
    _need(isinstance(labels, dict) and bool(labels), "labels", labels, "an object, such as {background: 0, lesion: 1}")
    for name, value in labels.items():
        values = value if isinstance(value, list) and value else [value]
        holds = all(type(v) is int and 0 <= v < 2**31 for v in values)
        _need(holds, f"labels.{name}", value, "a label or a list of labels")
    ending = content.get("file_ending")
    _need(isinstance(ending, str) and bool(re.fullmatch(r"\.[\w.]+", ending)), "file_ending", ending, "such as .nii.gz")


def check_plans(plans: Any, channels: int, trust: bool = False) -> None:
    """Raise unless plans can be used without harm.

    Args:
        plans: content of ``plans.json``.
        channels: number of channels of the data set.
        trust: let them name any class there is.

    Raises:
        ValueError: an entry of another type or out of range, or a class that may not be named.
    """
    _need(isinstance(plans, dict), "the file", plans, "an object")
    for name in ("dataset_name", "plans_name", "image_reader_writer"):
        _need(isinstance(plans.get(name), str), name, plans.get(name), "a text")
    for name in ("transpose_forward", "transpose_backward"):
        order = plans.get(name)
        known = isinstance(order, list) and all(type(axis) is int for axis in order)
        _need(known and sorted(order or ()) in ([0, 1], [0, 1, 2]), name, order, "an order of axes")
    configurations = plans.get("configurations")
    _need(isinstance(configurations, dict) and bool(configurations), "configurations", configurations, "an object")
    assert isinstance(configurations, dict)
    for name, configuration in configurations.items():
        _need(isinstance(configuration, dict), f"configurations.{name}", configuration, "an object")
        _check_configuration(configuration, f"configurations.{name}", channels)
    if not trust:
        _check_names(plans)


def _check_configuration(configuration: Mapping[str, Any], where: str, channels: int) -> None:
    """Check what is there; a configuration may inherit the rest."""

    def check(name: str, holds: Callable[[Any], bool], needed: str) -> None:
        if name in configuration:
            _need(holds(configuration[name]), f"{where}.{name}", configuration[name], needed)

    def numbers(value: Any, kind: tuple[type, ...], lowest: float) -> bool:
        return isinstance(value, list) and len(value) in (2, 3) and all(number(v, kind, lowest) for v in value)

    def number(value: Any, kind: tuple[type, ...], lowest: float) -> bool:
        return type(value) in kind and lowest <= value <= _LARGEST

    def entries(value: Any, kind: type) -> bool:
        return isinstance(value, list) and len(value) == channels and all(isinstance(entry, kind) for entry in value)

    check("patch_size", lambda v: numbers(v, (int,), 1), f"2 or 3 whole numbers from 1 to {_LARGEST}")
    check("spacing", lambda v: numbers(v, (int, float), 1e-6), f"2 or 3 numbers above 0, in mm, at most {_LARGEST}")
    check("batch_size", lambda v: type(v) is int and 1 <= v <= _LARGEST, "a whole number of at least 1")
    check("batch_dice", lambda v: isinstance(v, bool), "true or false")
    check("inherits_from", lambda v: isinstance(v, str), "a text")
    needed = f"a list of {channels}, one for each channel"
    check("normalization_schemes", lambda v: entries(v, str), needed)
    check("use_mask_for_norm", lambda v: entries(v, bool), needed)
    check(_ARCHITECTURE, lambda v: isinstance(v, dict), "an object")
    for name in (f"{fn}_kwargs" for fn in _RESAMPLING):
        check(name, lambda v: isinstance(v, dict), "an object")


def _check_names(plans: Mapping[str, Any]) -> None:
    """Look at every class and function that the plans name, before nnU-Net does."""
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter  # slow to import
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    _own("image_reader_writer", plans["image_reader_writer"], "imageio", BaseReaderWriter)
    if "label_manager" in plans:
        _own("label_manager", plans["label_manager"], "utilities.label_handling", LabelManager)
    for key, configuration in plans["configurations"].items():
        where = f"configurations.{key}"
        if "preprocessor_name" in configuration:
            name = configuration["preprocessor_name"]
            _own(f"{where}.preprocessor_name", name, "preprocessing.preprocessors", DefaultPreprocessor)
        for name in configuration.get("normalization_schemes", ()):
            _own(f"{where}.normalization_schemes", name, "preprocessing.normalization", ImageNormalization)
        for entry in _RESAMPLING:
            if entry in configuration:
                _own(f"{where}.{entry}", configuration[entry], "preprocessing.resampling", None)
        _check_architecture(configuration.get(_ARCHITECTURE), f"{where}.{_ARCHITECTURE}")


def _own(where: str, name: Any, room: str, kind: type | None) -> None:
    """Require a class of nnU-Net (or, without ``kind``, a function) that a folder of it defines."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    module = f"nnunetv2.{room}"
    _need(isinstance(name, str) and name.isidentifier(), where, name, f"a name in {module}")
    found = recursive_find_python_class(str(Path(nnunetv2.__path__[0], *room.split("."))), name, module)
    if kind is None:
        holds = inspect.isfunction(found) and found.__module__.startswith(module) and "resampl" in name
    else:
        holds = inspect.isclass(found) and issubclass(found, kind)
    _need(holds, where, name, f"a {'function' if kind is None else kind.__name__} of {module}", may_trust=True)


def _check_architecture(architecture: Any, where: str) -> None:
    from torch import nn

    if architecture is None:  # inherited, or plans of before nnU-Net 2.4, whose networks are a list of its own
        return
    required, arguments = architecture.get("_kw_requires_import"), architecture.get("arch_kwargs")
    _need(isinstance(arguments, dict), f"{where}.arch_kwargs", arguments, "an object")
    lists = isinstance(required, (list, tuple)) and all(isinstance(key, str) for key in required)
    _need(lists, f"{where}._kw_requires_import", required, "a list of texts")
    named: list[tuple[str, Any, tuple[str, ...]]] = [
        ("network_class_name", architecture.get("network_class_name"), _NETWORKS)
    ]
    named += [(f"arch_kwargs.{key}", arguments.get(key), _LAYERS) for key in required if arguments.get(key) is not None]
    for entry, name, packages in named:
        known = isinstance(name, str) and name.startswith(packages)
        found = _locate(name, entry == "network_class_name") if known else None
        holds = inspect.isclass(found) and issubclass(found, nn.Module)
        _need(holds, f"{where}.{entry}", name, f"a network part of {', '.join(packages).replace('.,', ',')[:-1]}", True)


def _locate(name: str, is_network: bool) -> Any:
    """Return what nnU-Net would find; a network that has moved it looks for by its last name."""
    found = pydoc.locate(name)
    if found is None and is_network:
        import dynamic_network_architectures as architectures
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        folder = str(Path(architectures.__path__[0], "architectures"))
        last = name.rpartition(".")[2]
        found = recursive_find_python_class(folder, last, "dynamic_network_architectures.architectures")
    return found


def _need(holds: bool, where: str, value: Any, needed: str, may_trust: bool = False) -> None:
    if not holds:
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
        trust = " If you trust whoever made it as you would a program, give --trust_checkpoint." if may_trust else ""
        raise ValueError(f"'{where}' must be {needed}, found {shown}.{trust}")
