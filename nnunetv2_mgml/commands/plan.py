"""``mgml plan``: plans of our own beside nnU-Net's, with the plugin's options; the preprocessed data is shared."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mgml import __version__
from nnunetv2_mgml.commands.info import options_text
from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.modalities import channel_index, channel_names
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans.options import EXACT_REPETITION, FUSION_REVISION, PLANS_KEY, NetworkOptions, parse_assignments
from nnunetv2_mgml.plans.presets import PAPER, PRESETS, presets
from nnunetv2_mgml.plans.regions import check_regions

NNUNET_KEYS: dict[str, str] = {
    "batch_size": "samples per training step, a whole number >= 1",
    "patch_size": "voxels in the axis order of the plan, [80, 80, 80] or 80x80x80; the network is planned anew for it",
    "batch_dice": "true: Dice over the whole batch, false: per sample",
}
"""Keys of nnU-Net's configurations that ``mgml plan --set`` takes too."""

SIZES = ("batch_size", "patch_size", "width_factor")
"""What ``--gpu_memory`` chooses."""
STOCK_KEY = "stock_plans"
"""Key beside our options in the plans: the name of nnU-Net's plans they started from."""
_STOCK_PLANS = "nnUNetPlans"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mgml plan``."""
    parser.add_argument("-d", metavar="DATASET", help="dataset id or name")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans to start from")
    parser.add_argument(
        "-c",
        metavar="CONFIGURATION",
        nargs="+",
        help=f"configurations in which {', '.join(NNUNET_KEYS)} are set (default: 3d_fullres, or the "
        f"first where there is none)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="options to change; --list shows them. Values are JSON or plain text",
    )
    parser.add_argument("--plans_name", default="nnUNetMGMLPlans", help="name of the plans to write")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        nargs="+",
        default=[],
        help="one or several. nnunet: back to nnU-Net's own training settings where the plans have those of paper; "
        "paper: those of the MGML paper ("
        + ", ".join(f"{key}={value}" for key, value in PAPER.items())
        + "); its augmentation is rotation up to 10 degrees, intensity scale and shift 0.1, flips"
        ". paper-losses: the total of the paper's text, reference-losses: that of its published code; both for "
        "reproduction. Default: what the plans have",
    )
    parser.add_argument(
        "--gpu_memory",
        metavar="GB",
        nargs="?",
        type=float,
        const=math.inf,
        help="predict the memory of a training step, from shapes alone. With a number, the GB of your GPU: also make "
        "batch_size, patch_size or width_factor smaller where the step does not fit; what --set names stays",
    )
    parser.add_argument("--list", action="store_true", help="list all options with their defaults and stop")


def run(args: argparse.Namespace) -> int:
    """Write the plans, then say what was written and how to train with it."""
    if args.list:
        print(options_text())
        print("\nper configuration (-c), default: what the plans have")
        print("\n".join(f"{key}\n{textwrap.indent(text, '    ')}" for key, text in NNUNET_KEYS.items()))
        return 0
    if args.d is None:
        raise ValueError("-d is missing: name the dataset by its id (137) or its name (Dataset137_BraTS2021).")
    folder = dataset_folder(args.d)
    source = _read_json(folder / f"{args.p}.json", "nnUNetv2_plan_and_preprocess")
    configurations = args.c or default_configurations(source)
    wanted = parse_assignments(args.set)
    if "paper" in args.preset and "patch_size" not in wanted:
        _check_paper_patch(source, configurations)
    changes = {**presets(args.preset), **wanted}
    target = folder / f"{args.plans_name}.json"
    replaced = _plans_to_replace(target)
    dataset_json = _read_json(folder / "dataset.json", "nnUNetv2_plan_and_preprocess")
    check_regions(dataset_json)
    channels = channel_names(dataset_json)
    if "nnunet" in args.preset and PLANS_KEY in source:
        stock = _read_json(
            folder / f"{source[PLANS_KEY].get(STOCK_KEY, _STOCK_PLANS)}.json", "nnUNetv2_plan_and_preprocess"
        )
        source = with_stock_sizes(source, stock, configurations)
    plans = make_plans(source, changes, configurations, args.plans_name, channels)
    predicted = []
    for name in configurations if args.gpu_memory is not None else ():
        plans, chosen, line = _fitted(plans, name, dataset_json, args.gpu_memory, wanted, args.plans_name)
        changes.update(chosen)
        predicted.append(line)
    write_json(target, plans, indent=4)
    print(f"{'Replaced' if replaced else 'Wrote'} {target}")
    for key, value in plans[PLANS_KEY]["config"].items():
        if replaced is not None and replaced.value(key) != value and key not in changes:
            print(
                f"  {key} = {json.dumps(value)}, was {json.dumps(replaced.value(key))}; start from the old plans with "
                f"-p {args.plans_name} to keep it"
            )
    for key, value in changes.items():
        where = f" ({', '.join(configurations)})" if key in NNUNET_KEYS else ""
        print(f"  {key} = {json.dumps(value)}{where}")
    for line in predicted:
        print(f"  {line}")
    if plans[PLANS_KEY]["config"]["seed"] is not None:
        print(f"  note: {EXACT_REPETITION}")
    print(f"Train with: nnUNetv2_train {args.d} {configurations[0]} 0 -tr nnUNetTrainerMGML -p {args.plans_name}")
    return 0


def make_plans(
    source: dict[str, Any],
    changes: dict[str, Any],
    configurations: Sequence[str],
    plans_name: str,
    channels: Sequence[str],
) -> dict[str, Any]:
    """Return plans with some options changed; ``source`` stays as it is.

    Args:
        source: nnU-Net's plans, or plans of ours, whose options are then the ones to start from.
        changes: options of `Options` and `NNUNET_KEYS`.
        configurations: those in which `NNUNET_KEYS` are changed.
        plans_name: name of the new plans.
        channels: the dataset's modality names in channel order.

    Raises:
        ValueError: an unknown option or configuration, or a bad value; the message lists what is allowed.
    """
    _check_keys(changes)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", plans_name) or "__" in plans_name:
        raise ValueError(
            f"Bad plans name '{plans_name}': use letters, digits, '.', '-' and single '_' (nnU-Net splits "
            f"the names of its result folders at '__')."
        )
    unknown = [name for name in configurations if name not in source["configurations"]]
    if unknown:
        raise ValueError(
            f"The plans have no configuration {', '.join(unknown)}. Allowed: {', '.join(source['configurations'])}."
        )
    wanted = {key: value for key, value in changes.items() if key not in NNUNET_KEYS}
    if "fusion" in wanted:  # a design chosen now is meant as it is now, also in plans that were written earlier
        wanted.setdefault("fusion_revision", FUSION_REVISION)
    options = Options.from_plans(source).updated(wanted)
    if {"fusion", "fusion_options", "fusion_revision"} & set(changes):
        _check_fusion(options.network)
    for name in options.sampling.modality_missing_rate:
        channel_index(name, channels)
    plans = copy.deepcopy(source)
    for name in configurations:
        plans["configurations"][name].update(_configuration_changes(source, name, changes))
    if "patch_size" in changes:
        _keep_pairs(source, plans)
    stock = source[PLANS_KEY].get(STOCK_KEY, _STOCK_PLANS) if PLANS_KEY in source else source["plans_name"]
    plans["plans_name"] = plans_name
    plans[PLANS_KEY] = {"config": options.as_dict(), "version": __version__, STOCK_KEY: stock}
    return plans


def _fitted(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    gigabytes: float,
    wanted: dict[str, Any],
    plans_name: str,
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return plans whose training step fits a GPU, what was changed for it, and what the step needs."""
    from nnunetv2_mgml.training.memory import ALLOWANCE, GIB
    from nnunetv2_mgml.training.memory_budget import fit

    if not gigabytes > 0:
        raise ValueError(f"--gpu_memory is the memory of a GPU in GB, above 0, got {gigabytes:g}.")

    def changed(changes: dict[str, Any]) -> dict[str, Any]:
        return make_plans(plans, changes, [configuration], plans_name, channel_names(dataset_json))

    found = fit(changed, configuration, dataset_json, gigabytes, [key for key in SIZES if key in wanted])
    of = "" if math.isinf(gigabytes) else f", {ALLOWANCE:.0%} of {gigabytes:g} GB are {ALLOWANCE * gigabytes:.2f}"
    line = (
        f"{configuration}: a training step in 16 bit needs {found.memory.peak / GIB:.2f} GiB, predicted from shapes"
        f" (weights, gradients and optimizer included; a GPU's own context comes on top){of}"
    )
    return (changed(found.changes) if found.changes else plans), found.changes, line


def with_stock_sizes(plans: dict[str, Any], stock: dict[str, Any], configurations: Sequence[str]) -> dict[str, Any]:
    """Return our plans with nnU-Net's own patch size, batch size and architecture in some configurations."""
    plans = copy.deepcopy(plans)
    for name in set(configurations) & set(plans["configurations"]) & set(stock["configurations"]):
        for key in ("patch_size", "architecture", "batch_size"):
            plans["configurations"][name].pop(key, None)
            if key in stock["configurations"][name]:
                plans["configurations"][name][key] = copy.deepcopy(stock["configurations"][name][key])
    return plans


def default_configurations(plans: dict[str, Any]) -> list[str]:
    """Return ``["3d_fullres"]`` where the plans have it, else their first configuration."""
    names = list(plans["configurations"])
    return ["3d_fullres"] if "3d_fullres" in names else names[:1]


def dataset_folder(dataset: str) -> Path:
    """Return the dataset's folder in nnUNet_preprocessed.

    Args:
        dataset: id (``137``) or name (``Dataset137_BraTS2021``).

    Raises:
        ValueError: nnUNet_preprocessed is not set, or the id is not one.
        FileNotFoundError: no such dataset, or several with this id.
    """
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise ValueError(
            "The environment variable nnUNet_preprocessed is not set; it names the folder nnU-Net keeps "
            "plans and preprocessed data in."
        )
    if not dataset.isdigit() and not dataset.startswith("Dataset"):
        raise ValueError(f"'{dataset}' is neither a dataset id (137) nor a name (Dataset137_BraTS2021).")
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdigit() else dataset
    found = sorted(path for path in Path(root).glob(pattern) if path.is_dir())
    if len(found) == 1:
        return found[0]
    if found:
        raise FileNotFoundError(f"Dataset {dataset} is ambiguous: {', '.join(p.name for p in found)}. Give the name.")
    present = ", ".join(sorted(path.name for path in Path(root).glob("Dataset*"))) or "none"
    raise FileNotFoundError(
        f"There is no dataset {dataset} in {root} (datasets there: {present}). Run "
        f"nnUNetv2_plan_and_preprocess -d {dataset} first."
    )


def _plans_to_replace(target: Path) -> Options | None:
    """Return the options of our plans in a file that is to be written, None where there is no file; refuse others'."""
    if not target.is_file():
        return None
    content = _read_json(target, "mgml plan")
    if not isinstance(content, dict) or PLANS_KEY not in content:
        raise ValueError(
            f"--plans_name {target.stem} would overwrite {target}, which is not from mgml plan (nnU-Net's "
            f"own plans, for instance). Choose a name that is not taken, such as {target.stem}_MGML."
        )
    return Options.from_plans(content)


def _check_paper_patch(source: dict[str, Any], configurations: Sequence[str]) -> None:
    """The paper's patch has three axes."""
    for name in configurations:
        if name in source["configurations"] and len(own := _resolved(source, name)["patch_size"]) != 3:
            raise ValueError(
                f"--preset paper sets the paper's patch_size {PAPER['patch_size']}, but configuration "
                f"{name} has {len(own)} axes. Give a patch of your own, for instance the plan's: --set "
                f"patch_size={'x'.join(map(str, own))}; or choose a 3D configuration with -c."
            )


def _check_keys(changes: dict[str, Any]) -> None:
    unknown = [key for key in changes if key not in NNUNET_KEYS and key not in Options.names()]
    if unknown:
        raise ValueError(
            f"Unknown option {', '.join(unknown)}. Allowed: {', '.join(Options.names())}; and, for the "
            f"configurations named by -c: {', '.join(NNUNET_KEYS)}."
        )


def _check_fusion(options: NetworkOptions) -> None:
    from nnunetv2_mgml.network.fusion import find_design

    find_design(options.fusion).take_options(options.fusion_options, options.fusion_revision)


def _configuration_changes(source: dict[str, Any], name: str, changes: dict[str, Any]) -> dict[str, Any]:
    result = {key: _parse_nnunet_value(key, value) for key, value in changes.items() if key in NNUNET_KEYS}
    if "patch_size" in result:
        from nnunetv2_mgml.plans.topology import replan

        try:
            result.update(replan(_resolved(source, name), result["patch_size"]))
        except ValueError as error:
            raise ValueError(f"Configuration {name}: {error}") from error
    return result


def _keep_pairs(source: dict[str, Any], plans: dict[str, Any]) -> None:
    """Patch size and architecture belong together: who inherits only one of them must not get the other's new half."""
    pair = {"patch_size", "architecture"}
    for name, configuration in plans["configurations"].items():
        if len(inherited := pair - set(configuration)) == 1:
            [key] = inherited
            configuration[key] = copy.deepcopy(_resolved(source, name)[key])


def _resolved(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with ``inherits_from`` applied, as nnU-Net does it."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    configuration: dict[str, Any] = PlansManager(plans).get_configuration(name).configuration
    return configuration


def _parse_nnunet_value(key: str, value: Any) -> Any:
    if key == "patch_size" and isinstance(value, str):
        value = [int(n) if n.strip().isdigit() else n for n in re.split("[x,]", value)]
    sizes = value if key == "patch_size" and isinstance(value, (list, tuple)) else [value]
    if key == "batch_dice":
        good = isinstance(value, bool)
    else:
        good = (key == "batch_size" or len(sizes) in (2, 3)) and all(type(n) is int and n >= 1 for n in sizes)
    if not good:
        raise ValueError(f"Bad value for {key}: {value!r}. Expected {NNUNET_KEYS[key]}.")
    return value


def _read_json(file: Path, command: str) -> dict[str, Any]:
    if not file.is_file():
        present = ", ".join(sorted(path.stem for path in file.parent.glob("*Plans*.json"))) or "none"
        raise FileNotFoundError(f"There is no {file} (plans there: {present}). Run {command} first.")
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    return content
