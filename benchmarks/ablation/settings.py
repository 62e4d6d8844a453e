"""Reads settings.json and turns it into runs: one training with its evaluation each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans.options import PLANS_KEY, NetworkOptions
from nnunetv2_mgml.training import TRAINERS
from nnunetv2_mgml.training.variants import nnUNetTrainerModalityDropout
from nnunetv2_mgml.workflows.plan import NNUNET_KEYS

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
SETTINGS = FOLDER / "settings.json"
STOCK_WIDTH = "stock_width_factor"
"""Beside the options in ``set`` of a variant: a stock network's feature channels as a multiple of nnU-Net's."""
STEP_SECONDS = RESULTS / "run_seconds.json"
"""What `run_seconds.py` measured: data set -> variant -> seconds of a training step."""

OF_PLANS = (*NNUNET_KEYS, STOCK_WIDTH)
"""What ``set`` can have beside the plugin's options."""


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    group: str
    dataset: str
    design: str
    variant: str
    seed: int
    fold: int
    trainer: str
    options: dict[str, Any] = field(hash=False)
    """Everything ``mgml plan --set`` gets, and `STOCK_WIDTH`."""
    dataset_settings: dict[str, Any] = field(hash=False)
    remove_small: dict[str, int] = field(hash=False)
    """Region -> voxels below which a prediction of it counts as none."""
    subsets: tuple[str, ...] = ()
    """The only subsets to evaluate; empty: all."""
    design_changed: bool = False
    """Whether it has a fusion design that is another one since version 0.1 (``changed_designs`` of settings.json)."""

    @property
    def name(self) -> str:
        """Name of the plans and of the result file; unique within the settings."""
        fold = f"_fold{self.fold}" if self.dataset_settings["kind"] == "real" else ""
        return f"{self.group}_{self.design}_{self.variant}{fold}_seed{self.seed}"

    @property
    def file(self) -> Path:
        """Where the result goes."""
        return RESULTS / self.group / f"{self.design}__{self.variant}__fold{self.fold}__seed{self.seed}.json"

    @property
    def config(self) -> Options:
        """Every option of the plugin as the trainer resolves it, defaults included."""
        return TRAINERS[self.trainer].resolve_options(
            {PLANS_KEY: {"config": {key: value for key, value in self.options.items() if key not in OF_PLANS}}}
        )

    @property
    def resolved(self) -> dict[str, Any]:
        """Everything that could change the result, defaults of the plugin included (code aside), as JSON has it."""
        plan = {key: value for key, value in self.options.items() if key in OF_PLANS}
        return json.loads(
            json.dumps(
                {
                    "is_mgml": not issubclass(TRAINERS[self.trainer], nnUNetTrainerModalityDropout),
                    "config": self.config.as_dict(),
                    "plan": plan,
                    "dataset": self.dataset_settings,
                    "fold": self.fold,
                    "remove_small": self.remove_small,
                    "subsets": list(self.subsets),
                }
            )
        )

    def finished(self) -> bool:
        """Whether a result of these very settings is there.

        Options the plugin has got since then are not compared: by default they leave what was there as it was, all but
        ``modality_decoder_scale``, which was 0, and ``conditional_norms``, which were not. A stock network is not built
        from options of ours.
        """
        if not self.file.is_file():
            return False
        stored, now = json.loads(self.file.read_text())["resolved"], self.resolved
        without = () if now["is_mgml"] else NetworkOptions.names()
        config = {"modality_decoder_scale": 0, "conditional_norms": False, **stored["config"]}
        before = {key: value for key, value in config.items() if key not in without}
        known = {key: now["config"].get(key) for key in before}
        return {**stored, "config": before} == {**now, "config": known}


def read_settings(file: Path = SETTINGS) -> dict[str, Any]:
    """Read the settings."""
    return json.loads(file.read_text())


def all_runs(settings: dict[str, Any], groups: Sequence[str] | None = None, equal_steps: bool = False) -> list[Run]:
    """Return the runs of some groups (default: all), seed by seed so that tables fill evenly.

    Args:
        settings: what `read_settings` returns.
        groups: names; None: all.
        equal_steps: give every run as many steps, also in groups whose runs are to take equal time.

    Raises:
        ValueError: an unknown group, two runs of one name, or a step that was not timed.
    """
    unknown = set(groups or ()) - set(settings["groups"])
    if unknown:
        raise ValueError(f"Unknown group {', '.join(sorted(unknown))}. Allowed: {', '.join(settings['groups'])}.")
    runs = [run for name in groups or settings["groups"] for run in _group_runs(settings, name, equal_steps)]
    names = [run.name for run in runs]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"Two runs are called {', '.join(doubles)}.")
    return runs


def equal_time_groups(settings: dict[str, Any]) -> list[str]:
    """Return the groups whose runs take as long as a variant of theirs (``equal_time``)."""
    return [name for name, group in settings["groups"].items() if "equal_time" in group]


def _steps_of(settings: dict[str, Any], group: dict[str, Any], variant: str) -> dict[str, int]:
    """Return how many steps an epoch has so that a variant's training takes the time of the reference's."""
    nominal = settings["training"][group["dataset"]]["num_iterations_per_epoch"]
    table = json.loads(STEP_SECONDS.read_text())["seconds"] if STEP_SECONDS.is_file() else {}
    seconds = table.get(group["dataset"], {})
    missing = [name for name in dict.fromkeys((group["equal_time"], variant)) if name not in seconds]
    if missing:
        raise ValueError(
            f"{STEP_SECONDS} has no step of {', '.join(missing)} on {group['dataset']}; on the idle machine: "
            "python benchmarks/ablation/run_seconds.py."
        )
    share = seconds[group["equal_time"]]["median"] / seconds[variant]["median"]
    return {"num_iterations_per_epoch": round(nominal * share)}


def _group_runs(settings: dict[str, Any], name: str, equal_steps: bool) -> Iterator[Run]:
    group = settings["groups"][name]
    dataset = group["dataset"]
    data = settings["datasets"][dataset]
    more = {int(seed): variants for seed, variants in group.get("more_seeds", {}).items()}
    for seed in [*group["seeds"], *more]:
        for fold in group.get("folds", [0]):
            for design in group["designs"]:
                for variant, trainer, changes, subsets in _variants(settings, group):
                    if variant not in more.get(seed, [variant]):
                        continue
                    options = {
                        **settings["training"][dataset],
                        "fusion": design,
                        "seed": seed,
                        **settings["design_options"].get(design, {}),
                        **changes,
                    }
                    if "equal_time" in group and not equal_steps:
                        options |= _steps_of(settings, group, variant)
                    yield Run(
                        name,
                        dataset,
                        design,
                        variant,
                        seed,
                        fold,
                        trainer,
                        options,
                        data,
                        settings["remove_small"][dataset],
                        subsets,
                        design in settings["changed_designs"]
                        and not issubclass(TRAINERS[trainer], nnUNetTrainerModalityDropout),
                    )


def _variants(
    settings: dict[str, Any], group: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any], tuple[str, ...]]]:
    """Yield name, trainer, options, subsets: variants as named, or changed by ``only_subsets`` or ``try``."""
    for variant in group["variants"]:
        entry = settings["variants"][variant]
        trainer, options = entry["trainer"], entry.get("set", {})
        if "only_subsets" in group:
            for subset in group["only_subsets"]:
                yield f"{variant}_only_{subset}", trainer, {**options, **only(subset)}, (subset,)
        elif "try" in group:
            for label, changes in group["try"].items():
                yield f"{variant}_{label}", trainer, {**options, **changes}, ()
        else:
            yield variant, trainer, options, ()


def only(subset: str) -> dict[str, Any]:
    """Return options under which every training sample has this subset alone (to one in a million)."""
    kept = subset.split("+")
    return {
        "mask_sampling": "bernoulli",
        "modality_missing_rate": {name: 0.0 if name in kept else 1 - 1e-6 for name in ("t1", "t1ce", "t2", "flair")},
    }
