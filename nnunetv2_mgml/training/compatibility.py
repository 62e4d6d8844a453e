"""Folds of one model folder share one ``plans.json``, from which inference rebuilds the network: they must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.network.build import build_network, count_modalities
from nnunetv2_mgml.objective import Options, needs_of
from nnunetv2_mgml.plans.options import differences


def network_differences(stored: dict[str, Any], plans: dict[str, Any], configuration: str) -> list[str]:
    """Return what makes two plans build different networks, one readable entry each; other options may differ."""
    before, now = Options.from_plans(stored), Options.from_plans(plans)
    found = differences(before.network, now.network)
    if needs_of(before).modality != needs_of(now).modality:
        found.append("only one of them has the shared modality decoder (modality_decoder_weight, soft_label)")
    resolved = [_resolved(p, configuration) for p in (stored, plans)]
    architectures, patches = ([own.get(key) for own in resolved] for key in ("architecture", "patch_size"))
    if architectures[0] != architectures[1]:
        found.append(f"the architecture of {configuration} differs (a changed patch_size can change it)")
    elif not found and patches[0] != patches[1] and len({_shapes(p, configuration) for p in (stored, plans)}) > 1:
        found.append(f"patch_size of {configuration} was {patches[0]}, is now {patches[1]}, and the fusion follows it")
    return found


def _resolved(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Return a configuration with what it inherits; empty where the plans do not have it."""
    if configuration not in plans["configurations"]:
        return {}
    found: dict[str, Any] = PlansManager(plans).get_configuration(configuration).configuration
    return found


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


def refuse_other_network(model_folder: Path, own_fold: str, plans: dict[str, Any], configuration: str) -> None:
    """Stop a training that would overwrite the plans of other folds' networks.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION``.
        own_fold: name of this training's fold folder.
        plans: this training's plans.
        configuration: its configuration.

    Raises:
        ValueError: another fold there has a checkpoint of a different network; the message names what differs.
    """
    file = model_folder / "plans.json"
    others = [path.parent.name for path in model_folder.glob("fold_*/checkpoint_*.pth") if path.parent.name != own_fold]
    if not others or not file.is_file():
        return
    differences = network_differences(json.loads(file.read_text()), plans, configuration)
    if differences:
        raise ValueError(
            f"{model_folder} holds {', '.join(sorted(set(others)))} of another network: "
            f"{'; '.join(differences)}. Training here would make it unusable. Give the new plans a name "
            f"of their own: mgml plan --plans_name."
        )


def cannot_resume(option: str, stored: Any, now: Any) -> ValueError:
    """Return the error for a checkpoint that cannot be resumed, as an option it depends on was another then."""
    return ValueError(
        f"The checkpoint was trained with {option}={stored}, this trainer has {option}={now}; use the same plans and "
        f"trainer."
    )
