"""Whether a training goes together with what was trained before: with its checkpoint, or with the folder's other folds.

Folds of one model folder share one ``plans.json`` and one ``dataset.json``, from which inference rebuilds the network.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.network.build import build_network, count_modalities, has_conditional_norms, modality_scale
from nnunetv2_mgml.network.fusion import find_design
from nnunetv2_mgml.network.transfer import labels_of
from nnunetv2_mgml.objective import Options, needs_of
from nnunetv2_mgml.plans.options import PLANS_KEY, NetworkOptions, differences, missing_options


def network_differences(
    stored: dict[str, Any], plans: dict[str, Any], configuration: str, by_options: bool = True
) -> list[str]:
    """Return what makes two plans build different networks, one readable entry each; other options may differ.

    Args:
        stored: plans.
        plans: other plans.
        configuration: the one that is trained.
        by_options: whether our options decide about the network; those of a stock network do not.
    """
    found = _differences_of_options(stored, plans, configuration) if by_options else []
    resolved = [_resolved(p, configuration) for p in (stored, plans)]
    architectures, patches = ([own.get(key) for own in resolved] for key in ("architecture", "patch_size"))
    if architectures[0] != architectures[1]:
        before, now = ((own or {}).get("arch_kwargs", {}).get("features_per_stage") for own in architectures)
        widths = f", features_per_stage was {before}, is now {now}" if before != now else ""
        found.append(
            f"the architecture of {configuration} differs{widths} (a changed patch_size or features_per_stage can "
            f"change it)"
        )
    elif by_options and not found and patches[0] != patches[1] and _shapes_differ(stored, plans, configuration):
        found.append(f"patch_size of {configuration} was {patches[0]}, is now {patches[1]}, and the fusion follows it")
    return found


def _differences_of_options(stored: dict[str, Any], plans: dict[str, Any], configuration: str) -> list[str]:
    before, now = Options.from_plans(stored), Options.from_plans(plans)
    own = before.network
    if own.fusion == now.network.fusion and _fusion_of(own) == _fusion_of(now.network):
        own = dataclasses.replace(
            own, fusion_revision=now.network.fusion_revision, fusion_options=now.network.fusion_options
        )
    scales = [_modality_scale(p, configuration, options) for p, options in ((stored, before), (plans, now))]
    if None in scales:
        scales = [None, None]
    norms = [_has_conditional_norms(p, configuration, options) for p, options in ((stored, before), (plans, now))]
    own, new = (
        dataclasses.replace(network, modality_decoder_scale=scale, conditional_norms=conditional)
        for network, scale, conditional in zip((own, now.network), scales, norms, strict=True)
    )
    found = differences(own, new)
    if needs_of(before).modality != needs_of(now).modality:
        found.append("only one of them has the shared modality decoder (modality_decoder_weight, soft_label)")
    return found


def _modality_scale(plans: dict[str, Any], configuration: str, options: Options) -> int | None:
    """Return where the decoder for the modalities ends; None of a network without, or without this configuration."""
    if configuration not in plans["configurations"] or not needs_of(options).modality:
        return None
    plan = PlansManager(plans).get_configuration(configuration)
    return modality_scale(options.network, plan.network_arch_init_kwargs["n_stages"])


def _has_conditional_norms(plans: dict[str, Any], configuration: str, options: Options) -> bool | None:
    """Return whether norms know what is visible; without this configuration what the options say."""
    if configuration not in plans["configurations"]:
        return options.network.conditional_norms
    plan = PlansManager(plans).get_configuration(configuration)
    return has_conditional_norms(options.network, plan.network_arch_init_kwargs)


def _fusion_of(options: NetworkOptions) -> dict[str, Any]:
    design = find_design(options.fusion)
    return design.acting(design.take_options(options.fusion_options, options.fusion_revision))


def options_of_model(model_folder: Path) -> dict[str, Any]:
    """Return what a model is by being older than options of ours, where plans without options continue it; or nothing.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION``, which need not be there.
    """
    file = model_folder / "plans.json"
    block = (json.loads(file.read_text()).get(PLANS_KEY) or {}) if file.is_file() else {}
    missing = missing_options(block)
    if "network_form" not in missing and "complete_every" in missing:  # its form was the default then, written down
        missing["network_form"] = block["config"]["network_form"]
    return missing


def changed_meaning(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return where a network's inputs or outputs mean something else by another ``dataset.json``, an entry each.

    Their names say what they mean. A new name in an old place is taken for a renaming; an old name in another place, or
    another number of them, is another meaning.
    """
    meanings = {
        "channels": [list(channel_names(content)) for content in (before, now)],
        "labels": [
            [name for name, _ in labels_of(content) if name not in ("background", "order")] for content in (before, now)
        ],
    }
    return [
        f"the {what} were {', '.join(old)}, are now {', '.join(new)}"
        for what, (old, new) in meanings.items()
        if len(old) != len(new) or any(a != b and (a in new or b in old) for a, b in zip(old, new, strict=True))
    ]


def _resolved(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Return a configuration with what it inherits; empty where the plans do not have it."""
    if configuration not in plans["configurations"]:
        return {}
    found: dict[str, Any] = PlansManager(plans).get_configuration(configuration).configuration
    return found


def _shapes_differ(stored: dict[str, Any], plans: dict[str, Any], configuration: str) -> bool:
    return len({_shapes(each, configuration) for each in (stored, plans)}) > 1


def _shapes(plans: dict[str, Any], configuration: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Return the tensors of our network as far as the patch has to do with them, built without data.

    None of them for plans of which only the stock network can be built.
    """
    plan, options = PlansManager(plans).get_configuration(configuration), Options.from_plans(plans)
    try:
        with torch.device("meta"):
            network = build_network(plan, options.network, count_modalities(plan), 1, 2, False, needs_of(options))
    except ValueError:
        return frozenset()
    return frozenset((name, tuple(tensor.shape)) for name, tensor in network.state_dict().items())


def refuse_other_network(
    model_folder: Path,
    own_fold: str,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    by_options: bool = True,
) -> None:
    """Stop a training that would overwrite the plans and the ``dataset.json`` of other folds' networks.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION``.
        own_fold: name of this training's fold folder.
        plans: this training's plans.
        configuration: its configuration.
        dataset_json: its ``dataset.json``.
        by_options: see `network_differences`.

    Raises:
        ValueError: another fold there has a checkpoint of a different network; the message names what differs.
    """
    file = model_folder / "plans.json"
    others = [path.parent.name for path in model_folder.glob("fold_*/checkpoint_*.pth") if path.parent.name != own_fold]
    if not others or not file.is_file():
        return
    differences = network_differences(json.loads(file.read_text()), plans, configuration, by_options)
    described = model_folder / "dataset.json"
    if described.is_file():
        differences += changed_meaning(json.loads(described.read_text()), dataset_json)
    if differences:
        raise ValueError(
            f"{model_folder} holds {', '.join(sorted(set(others)))} of another network: "
            f"{'; '.join(differences)}. Training here would make it unusable. Give the new plans a name "
            f"of their own (mgml plan --plans_name), or the data set another number where its channels or labels are "
            f"others."
        )


def cannot_resume(option: str, stored: Any, now: Any) -> ValueError:
    """Return the error for a checkpoint that cannot be resumed, as an option it depends on was another then."""
    return ValueError(
        f"The checkpoint was trained with {option}={stored}, this trainer has {option}={now}; use the same plans and "
        f"trainer."
    )
