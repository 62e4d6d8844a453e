"""Checkpoints: written whole or not at all, with what only training needs under a key of its own.

``network_weights`` hold the network alone, so that a model file and its use cost what those of the baseline cost. What
else a resumed training needs (the MetaNetwork, its optimizer, weights of the modalities) lies under `CHECKPOINT_KEY`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nnunetv2_mgml.io.files import replacing
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.plans.splits import TRAINING_CASES
from nnunetv2_mgml.training.compatibility import changed_meaning, network_differences
from nnunetv2_mgml.upstream.checkpoints import load_checkpoint

CHECKPOINT_KEY = "mgml"


def save(filename: str, write: Callable[[str], None], training_state: dict[str, Any]) -> None:
    """Write a checkpoint in one step; a kill at any moment leaves the file that was there before.

    What a killed process had begun goes with the next file written into the same folder (`io.files`).

    Args:
        filename: where it belongs.
        write: nnU-Net's own saving, given another name to write to.
        training_state: what goes under `CHECKPOINT_KEY`; nothing does where it is empty.
    """
    with replacing(filename) as temporary:
        write(str(temporary))
        if training_state:
            content = load_checkpoint(temporary, trust=True)  # written a moment ago
            torch.save({**content, CHECKPOINT_KEY: training_state}, temporary)


@dataclass(frozen=True)
class Stored:
    """What is asked of a checkpoint beside the weights, which nnU-Net loads."""

    plans: dict[str, Any]
    """The plans it was trained with."""
    dataset_json: dict[str, Any]
    """The ``dataset.json`` it was trained with."""
    training_state: dict[str, Any]
    """What lies under `CHECKPOINT_KEY`; its tensors are still on the disk."""

    @classmethod
    def read(cls, filename_or_checkpoint: dict[str, Any] | str) -> Stored:
        """Look into a checkpoint without reading the weights into memory."""
        content = filename_or_checkpoint
        if isinstance(content, str):
            content = load_checkpoint(content, mmap=True, flag=False)
        arguments = content["init_args"]
        return cls(arguments["plans"], arguments["dataset_json"], content.get(CHECKPOINT_KEY) or {})

    @property
    def options(self) -> Options:
        """The options it was trained with."""
        return Options.from_plans(self.plans)

    @property
    def training_cases(self) -> dict[str, Any] | None:
        """The `cases_digest` of what it was trained on; None: it was written before that was kept."""
        found: dict[str, Any] | None = self.plans.get(PLANS_KEY, {}).get(TRAINING_CASES)
        return found

    def refuse_other_network(
        self,
        filename: str,
        plans: dict[str, Any],
        configuration: str,
        dataset_json: dict[str, Any],
        by_options: bool = True,
    ) -> None:
        """Raise unless a training's plans build the network of this checkpoint, for the same channels and labels.

        Args:
            filename: of the checkpoint, for the message.
            plans: of the training.
            configuration: of the training.
            dataset_json: of the training.
            by_options: see `network_differences`.

        Raises:
            ValueError: it is another network, or means something else; the message names what differs.
        """
        differences = network_differences(self.plans, plans, configuration, by_options)
        differences += changed_meaning(self.dataset_json, dataset_json)
        if differences:
            raise ValueError(
                f"{filename} was trained with another network: {'; '.join(differences)}. Use the plans and the "
                f"dataset.json it was trained with."
            )
