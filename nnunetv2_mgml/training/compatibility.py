"""Folds of one model folder share one ``plans.json``, from which inference rebuilds the network: they must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunetv2_mgml.objective import Options, needs_of
from nnunetv2_mgml.plans.options import differences


def network_differences(stored: dict[str, Any], plans: dict[str, Any], configuration: str) -> list[str]:
    """Return what makes two plans build different networks, one readable entry each; other options may differ."""
    before, now = Options.from_plans(stored), Options.from_plans(plans)
    found = differences(before.network, now.network)
    if needs_of(before).modality != needs_of(now).modality:
        found.append("only one of them has the shared modality decoder (modality_decoder_weight, soft_label)")
    architectures = [p["configurations"].get(configuration, {}).get("architecture") for p in (stored, plans)]
    if architectures[0] != architectures[1]:
        found.append(f"the architecture of {configuration} differs (a changed patch_size changes it)")
    return found


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
