"""Plans of our own beside nnU-Net's: its configurations with the plugin's options; the preprocessed data is shared."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2_mgml import __version__
from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.modalities import channel_index, channel_names
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.reading import note_on_regions
from nnunetv2_mgml.plans.cohort import MISSING_FILE, raw_cases
from nnunetv2_mgml.plans.folders import RAW, dataset_folder
from nnunetv2_mgml.plans.options import FUSION_REVISION, PLANS_KEY, NetworkOptions
from nnunetv2_mgml.plans.planned import planned_folder, read_planned
from nnunetv2_mgml.plans.presets import PAPER, presets
from nnunetv2_mgml.plans.regions import check_regions

NNUNET_KEYS: dict[str, str] = {
    "batch_size": "samples per training step, a whole number >= 1",
    "patch_size": "voxels in the axis order of the plan, [80, 80, 80] or 80x80x80; the network is planned anew for it",
    "batch_dice": "true: Dice over the whole batch, false: per sample",
    "features_per_stage": "feature channels of the U-Net, one whole number for each stage, [16, 32, 64, 128, 160, "
    "160]; or a multiple of those in the plans it starts from, 0.5, in multiples of 8. It is the network of every "
    "trainer, nnU-Net's own too; width_factor counts from there",
}
"""Keys of nnU-Net's configurations that can be set beside the options."""

STOCK_KEY = "stock_plans"
"""Key beside our options in the plans: the name of nnU-Net's plans they started from."""
STOCK_PLANS = "nnUNetPlans"
MGML_PLANS = "nnUNetMGMLPlans"
GPU_SHARE = 0.8
"""Of a GPU's memory, that a plan may use by the prediction: on an H200 PyTorch reserved 1.2 times what lived."""
SIZES = ("batch_size", "patch_size", "width_factor")
"""What is made smaller where a training step does not fit a GPU."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanRequest:
    """What plans to write."""

    dataset: str
    """Id (``137``) or name (``Dataset137_BraTS2021``) of a data set that nnU-Net has planned."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Options, and keys of `NNUNET_KEYS`, to set; they go over ``presets``."""
    plans: str = STOCK_PLANS
    """Name of the plans to start from: nnU-Net's, or ours."""
    configurations: tuple[str, ...] = ()
    """Those in which `NNUNET_KEYS` are set; none: see `default_configurations`."""
    presets: tuple[str, ...] = ()
    """Of `plans.presets.PRESETS`; none: what the plans have."""
    plans_name: str = MGML_PLANS
    """Name of the plans to write; plans of ours that are there are replaced, others never."""
    gpu_memory: float | None = None
    """In 2^30 bytes: say what a training step needs, and make `SIZES` smaller to fit, as far as ``changes`` does not
    name them; infinity: only say it."""


@dataclass(frozen=True)
class WrittenPlans:
    """What `write_plans` has done."""

    path: Path
    configurations: tuple[str, ...]
    """Those in which `NNUNET_KEYS` were set."""
    options: Options
    """What the plans have now."""
    changes: dict[str, Any]
    """What presets and request have set."""
    replaced: Options | None
    """What the plans that were there had, or None."""
    stock: str = STOCK_PLANS
    """Name of nnU-Net's plans these started from."""
    fitted: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Configuration -> what was made smaller there to fit ``gpu_memory``."""
    lost_sizes: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    """Configuration -> `NNUNET_KEYS` of the replaced plans that were not asked to change, but did -> before and now."""
    replaced_stock: str | None = None
    """Name of nnU-Net's plans that the replaced plans started from, where that was another one."""
    memory: dict[str, float] = field(default_factory=dict)
    """Configuration -> GiB that a training step in 16 bit needs; empty where nobody asked."""
    inherited: dict[str, list[str]] = field(default_factory=dict)
    """Configuration -> `NNUNET_KEYS` that changed there too, since it inherits from one in which they were set."""
    restored: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Configuration -> the sizes the preset ``nnunet`` has brought back there."""

    @property
    def lost(self) -> dict[str, tuple[Any, Any]]:
        """Options of the replaced plans that were not asked to change, but did -> before and now."""
        if self.replaced is None:
            return {}
        pairs = {key: (self.replaced.value(key), now) for key, now in self.options.as_dict().items()}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in self.changes}


def write_plans(request: PlanRequest) -> WrittenPlans:
    """Write plans of our own into the data set's folder in nnUNet_preprocessed.

    Raises:
        ValueError: an unknown option or configuration, a bad value, regions that cannot work, or a plans name that is
            taken; the message lists what is allowed. Or nothing allowed fits ``gpu_memory``.
        FileNotFoundError: no such data set or plans.
    """
    folder = planned_folder(request.dataset)
    source = read_planned(folder / f"{request.plans}.json")
    configurations = request.configurations or tuple(default_configurations(source))
    if "paper" in request.presets and "patch_size" not in request.changes:
        _check_paper_patch(source, configurations)
    changes = {**presets(request.presets, Options.from_plans(source)), **request.changes}
    target = folder / f"{request.plans_name}.json"
    replaced = _plans_to_replace(target)
    dataset_json = read_planned(folder / "dataset.json")
    check_regions(dataset_json)
    if note := shared_files(folder.name, channel_names(dataset_json)):
        _log.warning("%s", note)
    restored: dict[str, dict[str, Any]] = {}
    if "nnunet" in request.presets and PLANS_KEY in source:
        stock = read_planned(folder / f"{source[PLANS_KEY].get(STOCK_KEY, STOCK_PLANS)}.json")
        own, source = source, with_stock_sizes(source, stock, configurations)
        restored = _changed_sizes(own, source, configurations, changes)
    plans = make_plans(source, changes, configurations, request.plans_name, channel_names(dataset_json))
    fitted: dict[str, dict[str, Any]] = {}
    memory: dict[str, float] = {}
    if note := note_on_regions(Options.from_plans(plans), bool(dataset_json.get("regions_class_order"))):
        _log.warning("%s", note)
    if request.gpu_memory is not None:
        plans, fitted, memory = _all_fitted(plans, configurations, dataset_json, request)
        changes.update({key: value for own in fitted.values() for key, value in own.items() if key not in NNUNET_KEYS})
    write_json(target, plans, indent=4)
    before = None if replaced is None else replaced[PLANS_KEY].get(STOCK_KEY, STOCK_PLANS)
    now = plans[PLANS_KEY][STOCK_KEY]
    lost = {} if replaced is None else _lost_sizes(replaced, plans, configurations, changes, (fitted, restored))
    return WrittenPlans(
        target,
        configurations,
        Options.from_plans(plans),
        changes,
        None if replaced is None else Options.from_plans(replaced),
        stock=now,
        fitted={name: {k: v for k, v in own.items() if k in NNUNET_KEYS} for name, own in fitted.items()},
        lost_sizes=lost,
        replaced_stock=before if before != now else None,
        memory=memory,
        inherited={
            name: keys for name in plans["configurations"] if (keys := _inherited(plans, name, configurations, changes))
        },
        restored=restored,
    )


def trains_compiled() -> bool:
    """Return whether nnU-Net compiles networks on a GPU (``nnUNet_compile``; it does where that is not set)."""
    return os.environ.get("nnUNet_compile", "true").lower() in ("true", "1", "t")


def shared_files(dataset: str, channels: Sequence[str]) -> str:
    """Say what follows where one file holds all channels of a case (colours); empty elsewhere, or without raw data."""
    try:
        folder = dataset_folder(dataset, RAW)
        cases = raw_cases(folder)
    except (ValueError, FileNotFoundError):
        return ""
    if len(channels) < 2 or (folder / MISSING_FILE).is_file() or any(set(case.files) != {0} for case in cases):
        return ""
    return (
        f"Every case of {dataset} has one file for its {len(channels)} channels ({', '.join(channels)}), as colours "
        f"have. A modality is missing where its file is: to predict without one, or to have incomplete cases, give "
        f"each a file of its own (CASE_0000, CASE_0001, ...)."
    )


def _all_fitted(
    plans: dict[str, Any], configurations: Sequence[str], dataset_json: dict[str, Any], request: PlanRequest
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, float]]:
    """Return plans whose training steps fit a GPU, and per configuration what was changed and the GiB it needs."""
    changed: dict[str, dict[str, Any]] = {}
    memory: dict[str, float] = {}
    for name in configurations:
        plans, changed[name], memory[name] = _fitted(plans, name, dataset_json, request)
        if "width_factor" in changed[name]:  # it is that of all configurations: those before need less now
            memory.update({other: _fitted(plans, other, dataset_json, request)[2] for other in memory if other != name})
    return plans, changed, memory


def _fitted(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], request: PlanRequest
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Return plans whose training step fits a GPU, what was changed for it, and the GiB it needs."""
    from nnunetv2_mgml.workflows.memory_budget import fit  # and with it the networks

    gigabytes = request.gpu_memory
    if gigabytes is None or not gigabytes > 0:
        raise ValueError(f"--gpu_memory is the memory of a GPU in GB, above 0, got {gigabytes}.")
    channels = channel_names(dataset_json)

    def changed(changes: dict[str, Any]) -> dict[str, Any]:
        return make_plans(plans, changes, [configuration], request.plans_name, channels)

    def counted(changes: dict[str, Any]) -> dict[str, Any]:  # a compiled network keeps what it would compute again
        return changed({**changes, **({"gradient_checkpointing": False} if trains_compiled() else {})})

    fixed = [key for key in SIZES if key in request.changes]
    if not isinstance(request.changes.get("features_per_stage", 1), (int, float)):
        fixed.append("features_per_stage")  # one for each stage, of which another patch may have fewer
    found = fit(counted, configuration, dataset_json, GPU_SHARE * gigabytes * 2**30, fixed)
    return (changed(found.changes) if found.changes else plans), found.changes, found.memory.peak / 2**30


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
        channel_index(name, channels, "This data set")
    plans = copy.deepcopy(source)
    for name in configurations:
        plans["configurations"][name].update(_configuration_changes(source, name, changes))
    if {"patch_size", "features_per_stage"} & set(changes):
        _keep_pairs(source, plans)
    if options.network.modality_decoder_scale or options.network.conditional_norms:
        _check_network(options.network, plans, configurations)
    stock = source[PLANS_KEY].get(STOCK_KEY, STOCK_PLANS) if PLANS_KEY in source else source["plans_name"]
    plans["plans_name"] = plans_name
    plans[PLANS_KEY] = {"config": options.as_dict(), "version": __version__, STOCK_KEY: stock}
    return plans


def with_stock_sizes(plans: dict[str, Any], stock: dict[str, Any], configurations: Sequence[str]) -> dict[str, Any]:
    """Return our plans with nnU-Net's own patch size, batch size and architecture in some configurations."""
    plans = copy.deepcopy(plans)
    for name in set(configurations) & set(plans["configurations"]) & set(stock["configurations"]):
        for key in ("patch_size", "architecture", "batch_size"):
            plans["configurations"][name].pop(key, None)
            if key in stock["configurations"][name]:
                plans["configurations"][name][key] = copy.deepcopy(stock["configurations"][name][key])
    return plans


def _changed_sizes(
    before: dict[str, Any], now: dict[str, Any], configurations: Sequence[str], asked: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return configuration -> patch, batch and network sizes that differ between two plans and were not asked for."""
    found = {}
    for name in [name for name in configurations if name in before["configurations"]]:
        old, new = _resolved(before, name), _resolved(now, name)
        sizes = {
            key: _size(new, key)
            for key in ("patch_size", "batch_size", "features_per_stage")
            if key not in asked and _differ(_size(old, key), _size(new, key))
        }
        if sizes:
            found[name] = sizes
    return found


def _size(configuration: dict[str, Any], key: str) -> Any:
    """Return one of `NNUNET_KEYS` of a resolved configuration, None where it has none."""
    if key != "features_per_stage":
        return configuration.get(key)
    return configuration.get("architecture", {}).get("arch_kwargs", {}).get(key)


def _differ(before: Any, now: Any) -> bool:
    """Whether a size changed; further or fewer stages, which a patch brings, are no other features."""
    if isinstance(before, list) and isinstance(now, list):
        return any(one != other for one, other in zip(before, now, strict=False))
    return bool(before != now)


def default_configurations(plans: dict[str, Any]) -> list[str]:
    """Return ``["3d_fullres"]`` where the plans have it, else their first configuration."""
    names = list(plans["configurations"])
    return ["3d_fullres"] if "3d_fullres" in names else names[:1]


def _plans_to_replace(target: Path) -> dict[str, Any] | None:
    """Return our plans in a file that is to be written, None where there is no file; refuse others'."""
    if not target.is_file():
        return None
    content = read_json(target)
    if not isinstance(content, dict) or PLANS_KEY not in content:
        raise ValueError(
            f"--plans_name {target.stem} would overwrite {target}, which is not from mgml plan (nnU-Net's "
            f"own plans, for instance). Choose a name that is not taken, such as {target.stem}_MGML."
        )
    return content


def _lost_sizes(
    before: dict[str, Any],
    now: dict[str, Any],
    configurations: Sequence[str],
    asked: Mapping[str, Any],
    told: Sequence[Mapping[str, Mapping[str, Any]]],
) -> dict[str, dict[str, tuple[Any, Any]]]:
    """See `WrittenPlans.lost_sizes`."""
    found = {}
    for name in [name for name in before["configurations"] if name in now["configurations"]]:
        old, new = _resolved(before, name), _resolved(now, name)
        meant = {*(asked if name in configurations else ()), *(key for each in told for key in each.get(name, ()))}
        meant.update(_inherited(now, name, configurations, asked))
        pairs = {key: (_size(old, key), _size(new, key)) for key in NNUNET_KEYS if key not in meant}
        if lost := {key: pair for key, pair in pairs.items() if _differ(*pair)}:
            found[name] = lost
    return found


def _inherited(plans: dict[str, Any], name: str, configurations: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Return those of `NNUNET_KEYS` among some keys that a configuration has from one of ``configurations``."""
    if name in configurations:
        return []
    found = []
    for key in [key for key in keys if key in NNUNET_KEYS]:
        holder, place = name, "architecture" if key == "features_per_stage" else key
        while place not in plans["configurations"][holder] and "inherits_from" in plans["configurations"][holder]:
            holder = plans["configurations"][holder]["inherits_from"]
        if holder in configurations:
            found.append(key)
    return found


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
    from nnunetv2_mgml.network.fusion import find_design  # and with it the networks

    find_design(options.fusion).take_options(options.fusion_options, options.fusion_revision)


def _check_network(options: NetworkOptions, plans: dict[str, Any], configurations: Sequence[str]) -> None:
    from nnunetv2_mgml.network.build import has_conditional_norms, modality_scale  # and with it the networks

    for name in configurations:
        kwargs = _resolved(plans, name)["architecture"]["arch_kwargs"]
        try:
            modality_scale(options, kwargs["n_stages"])
            has_conditional_norms(options, kwargs)
        except ValueError as error:
            raise ValueError(f"Configuration {name}: {error}") from error


def _configuration_changes(source: dict[str, Any], name: str, changes: dict[str, Any]) -> dict[str, Any]:
    result = {key: _parse_nnunet_value(key, value) for key, value in changes.items() if key in NNUNET_KEYS}
    features = result.pop("features_per_stage", None)
    if features is None and "patch_size" not in result:
        return result
    from nnunetv2_mgml.plans.topology import replan, with_features  # and with it nnU-Net

    configuration = _resolved(source, name)
    try:
        if "patch_size" in result:
            result.update(replan(configuration, result["patch_size"]))
        if features is not None:
            result.update(with_features({**configuration, **result}, features))
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
    lists = ("patch_size", "features_per_stage")
    if key in lists and isinstance(value, str):
        value = [int(n) if n.strip().isdigit() else n for n in re.split("[x,]", value)]
    numbers = value if key in lists and isinstance(value, (list, tuple)) else [value]
    whole = all(type(n) is int and n >= 1 for n in numbers)
    good = {
        "batch_dice": isinstance(value, bool),
        "batch_size": whole,
        "patch_size": whole and len(numbers) in (2, 3),
        "features_per_stage": (whole and numbers is value) or (type(value) in (int, float) and 0.05 <= value <= 4),
    }
    if not good[key]:
        raise ValueError(f"Bad value for {key}: {value!r}. Expected {NNUNET_KEYS[key]}.")
    return value
