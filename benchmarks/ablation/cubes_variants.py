"""What a run on the cubes is: a variant of `cubes.json`, with or without changes, and a seed (imports no torch)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mgml.modalities import Subset, all_subsets, parse_subset, subset_name

CHANNELS = ("t1", "t1ce", "t2", "flair")
STEP_SECONDS = Path(__file__).parent / "results" / "cubes_seconds.json"
"""What `cubes_seconds.py` measured."""
SETTINGS = json.loads((Path(__file__).parent / "cubes.json").read_text())
OF_ALL = SETTINGS["options"]
"""Options of the plugin that every variant has whose name does not say otherwise: what was the default at first, so
that a name means the same in all results."""
_FREE = ("only", "patients", "lacking", "learning_rate", "weight_decay")
"""Settings that do not change what a step costs."""


@dataclass(frozen=True)
class Run:
    """One training: a variant and a seed."""

    name: str
    """``baseline``, or ``baseline:learning_rate=0.005`` where something is changed beside the variant's own."""
    seed: int
    steps: int

    def file_name(self, equal_time: bool = False) -> str:
        """Return the name of the result file."""
        budget = f"{self.steps}{'_equal_time' if equal_time else ''}"
        return f"{self.name.translate(str.maketrans(':=,', '___'))}__{budget}__seed{self.seed}.json"

    @property
    def timed_as(self) -> str:
        """The name without changes that cost no time: whose step is the same."""
        variant, _, changes = self.name.partition(":")
        kept = [change for change in changes.split(",") if change and change.partition("=")[0] not in _FREE]
        return f"{variant}:{','.join(kept)}" if kept else variant

    @property
    def training(self) -> dict[str, Any]:
        """Settings of the training."""
        return {key: value for key, value in self._all().items() if key in SETTINGS["training"]}

    @property
    def options(self) -> dict[str, Any]:
        """Options of the plugin beyond its defaults."""
        return {key: value for key, value in self._all().items() if key not in SETTINGS["training"]}

    def _all(self) -> dict[str, Any]:
        variant, _, changes = self.name.partition(":")
        if variant not in SETTINGS["variants"]:
            raise ValueError(f"Unknown variant {variant}. Allowed: {', '.join(SETTINGS['variants'])}.")
        settings = {**SETTINGS["training"], **SETTINGS["variants"][variant]}
        for change in changes.split(",") if changes else ():
            key, _, text = change.partition("=")
            try:
                settings[key] = json.loads(text)
            except json.JSONDecodeError:
                settings[key] = text
        return settings

    @property
    def subsets(self) -> list[Subset]:
        """What the run is scored on: all subsets, or the only one it was trained on."""
        only = self.training["only"]
        return [parse_subset(only, CHANNELS)] if only else list(all_subsets(len(CHANNELS)))


SPECIALISTS = "modality_dropout"
"""The variant whose network specialists are: the stock network, without anything that knows of missing modalities."""
THREE_SEEDS = ("t1", "t1ce", "t2", "flair", "t1+t1ce+t2+flair")
"""Subsets whose specialists are trained with all seeds."""
_TODAY = "conditional_norms=true,network_form=shared_encoder,complete_every=4"
DEFAULT, BASELINE = (f"{name}:{_TODAY}" for name in ("mgml", "baseline"))
"""The plugin's default, and the same network without our terms."""
PASSION = "passion"
"""The variant for patients that lack modalities, which hides nothing of what they have."""
LACKING = ("baseline", "mgml", "modality_dropout", PASSION)
"""Variants that are also trained on patients that lack modalities at unequal rates."""
FEW = 30
"""Patients of the second regime, in which regularisers have more to do."""


def specialist(subset: str) -> str:
    """Return the variant that is trained on one subset alone."""
    return f"{SPECIALISTS}:only={subset}"


def whole_table(seeds: list[int], steps: int) -> list[Run]:
    """Return every run of the results page.

    All variants with all seeds, from all patients and from `FEW`; a specialist for each of the 15 subsets, with the
    first seed, those of `THREE_SEEDS` with all.
    """
    subsets = [subset_name(subset, CHANNELS) for subset in all_subsets(len(CHANNELS))]
    for_all = [name for name in SETTINGS["variants"] if name != PASSION]
    variants = [f"{name}{change}" for change in ("", f":patients={FEW}") for name in for_all]
    variants += [BASELINE, DEFAULT]
    variants += [f"{name}:lacking=true" for name in LACKING]
    runs = [Run(name, seed, steps) for seed in seeds for name in variants]
    alone = [(specialist(s), seed) for n, seed in enumerate(seeds) for s in subsets if n == 0 or s in THREE_SEEDS]
    return [*runs, *(Run(name, seed, steps) for name, seed in alone)]
