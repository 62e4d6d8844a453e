"""What the results page says of whole volumes at equal time: real brains and phantoms, from the results of `run.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

import cubes_specialists
import cubes_table
import numpy as np
from collect import Result, difference, select, statistics
from page_tables import CHANGE, REGIONS, change_cells, mark, table
from settings import STEP_SECONDS, Run

from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.modalities import parse_subset
from nnunetv2_mgml.scoring.derived import MARGIN, nested_pairs


def brains(settings: dict[str, Any], results: Sequence[Result]) -> str:
    """Return the section on whole brains."""
    chosen = select(results, "brains")
    data, training = settings["datasets"]["brains"], settings["training"]["brains"]
    patch = "x".join(map(str, training["patch_size"]))
    steps = training["num_epochs"] * training["num_iterations_per_epoch"]
    return (
        "## Whole brains at equal time\n\nThe 44 cases of BraTS 2018, 2021 and 2023 of `MGML_REAL_DATA` at "
        f"{data['spacing_mm'][0]:g} mm, {data['folds']} cross-validation folds, whole volumes predicted without "
        f"mirroring: `run_seconds.py`, then `run.py --groups brains`. Every training takes the time of {steps} steps "
        f"of `{settings['groups']['brains']['equal_time']}` on one core, with batch {training['batch_size']} and "
        f"patches of {patch}, and every network has **its default width**: nnU-Net's for the stock network, of which "
        "one encoder per modality has a part (5.6 and 4.3 million parameters; the default, one encoder for all, has "
        "1.7). In the rows called `narrow` it has half of it, as on the cubes: more steps in the same time. None is "
        "converged; some of these patients are also among "
        f"the cubes. `{DEFAULT}` is the plugin's default, `{BASELINE}` the same network without our terms; the others "
        "of ours have an encoder per modality and full steps only, and but for `mgml_conditional` and "
        "`baseline_conditional` plain norms.\n\n" + _table(settings, "brains", chosen) + _beside_rivals(chosen)
    )


BASELINE, DEFAULT = "baseline_shared", "mgml_shared"
"""The network of the plugin's default without our terms and with them, among the variants of the whole brains."""
_RIVALS = (
    BASELINE,
    "mgml_conditional",
    "baseline_conditional",
    "mgml",
    "conditional_dropout_narrow",
    "modality_dropout_narrow",
)
"""What the default is compared with below the table: the same without terms, an encoder per modality with full steps
only (the default before), that without terms or without conditional norms, and stock networks of half the width, which
do the most steps in the same time."""


def _beside_rivals(results: Sequence[Result]) -> str:
    """Return how far the default is ahead of each rival, on the folds that both have and on each."""
    return "".join(_beside(results, name) for name in _RIVALS)


def _beside(results: Sequence[Result], other: str) -> str:
    runs = _of_all_folds([select(results, variant=name) for name in (other, DEFAULT)])
    change = difference(*runs)
    if change is None:
        return ""
    return (
        f"\n`{DEFAULT}` against `{other}`: {change.mean:+.2f}, 95 % interval {change.low:+.2f} to "
        f"{change.high:+.2f}; per fold {_per_fold(*runs)}.\n"
    )


def _of_all_folds(both: Sequence[Sequence[Result]]) -> list[list[Result]]:
    """Return the results of two variants, of the seeds that both have with as many folds as any: each case once."""
    shared = set.intersection(*({(r.run.seed, r.run.fold) for r in each} for each in both))
    folds = Counter(seed for seed, _ in shared)
    full = {seed for seed, count in folds.items() if count == max(folds.values())}
    return [[r for r in each if (r.run.seed, r.run.fold) in shared and r.run.seed in full] for each in both]


def _per_fold(reference: Sequence[Result], runs: Sequence[Result]) -> str:
    """Return the difference on each fold, seed by seed, of what `_of_all_folds` returned."""
    told: dict[int, list[str]] = {}
    for seed, fold in sorted({(r.run.seed, r.run.fold) for r in runs}):
        change = difference(
            *([r for r in each if (r.run.seed, r.run.fold) == (seed, fold)] for each in (reference, runs))
        )
        told.setdefault(seed, []).append("" if change is None else f"{change.mean:+.2f}")
    if len(told) == 1:
        return " ".join(*told.values())
    return "; ".join(f"{' '.join(changes)} (seed {seed})" for seed, changes in told.items())


def phantoms(settings: dict[str, Any], results: Sequence[Result]) -> str:
    """Return the section on synthetic patients at equal time."""
    chosen, baseline = select(results, "equal_time"), select(results, "main", variant=cubes_table.BASELINE)
    return (
        "### The same at equal time\n\nEvery training takes as long as the baseline's of the table above, whose row "
        "this is, by `results/run_seconds.json`: steps of the plugin's own trainings on an idle core, every network "
        "at its default width.\n\n" + _table(settings, "equal_time", [*baseline, *chosen])
    )


def _table(settings: dict[str, Any], group: str, results: Sequence[Result]) -> str:
    """Return a row per variant that has finished runs, of the seeds and folds that all of these have.

    Before it stand tables of those that have more of them in common. Differences are to the baseline, or as long as it
    has no finished runs, to the variant whose time all take.
    """
    names = dict.fromkeys([cubes_table.BASELINE, *settings["groups"][group]["variants"]])
    found = {name: runs for name in names if (runs := [r for r in results if r.run.variant == name])}
    done = {name: {(r.run.seed, r.run.fold) for r in runs} for name, runs in found.items()}
    shared = set.intersection(*done.values()) if done else set()
    candidates = (cubes_table.BASELINE, settings["groups"][group]["equal_time"])
    reference = next((name for name in candidates if name in found), None)
    if reference is None:
        return table([], [])
    folds = len(settings["groups"][group].get("folds", [0]))
    parts = []
    with_reference = {frozenset(ours & done[reference]) for name, ours in done.items() if name != reference}
    for more in sorted((each for each in with_reference if each > shared), key=len, reverse=True):
        chosen = {name: runs for name, runs in found.items() if done[name] >= more}
        parts += [f"{_extent(found[reference], more, folds)}:\n", _rows(chosen, more, reference)]
    if shared:
        of_all = _rows(found, shared, reference)
        parts += ["On what all of them have:\n", of_all] if parts else [of_all]
    missing = [f"`{name}`" for name in names if name not in found]
    partly = 0 < len({fold for _, fold in shared}) < folds
    notes = [f"So far {_extent(found[reference], shared, folds)}."] if partly else []
    notes += [f"Not finished: {', '.join(missing)}."] if missing else []
    return "\n".join([*parts, *([f"{' '.join(notes)}\n"] if notes else [])])


def _extent(reference: Sequence[Result], shared: Set[tuple[int, int]], folds: int) -> str:
    """Return on how much data results are that some variants share with the reference."""
    first = min(seed for seed, _ in shared)
    of_one_seed = (r for r in reference if (r.run.seed, r.run.fold) in shared and r.run.seed == first)
    cases = sum(len(r.content["cases"]) for r in of_one_seed)
    return f"{len({fold for _, fold in shared})} of {folds} folds, with {cases} cases"


def _rows(found: Mapping[str, Sequence[Result]], shared: Set[tuple[int, int]], reference: str) -> str:
    """Return the table of some variants on the seeds and folds that they share."""
    chosen = {name: [r for r in runs if (r.run.seed, r.run.fold) in shared] for name, runs in found.items()}
    rows = []
    for name, runs in chosen.items():
        change = None if name == reference else difference(chosen[reference], runs)
        rows.append([f"`{name}`", *_cells(runs), *_spent(runs[0].run), *change_cells(change)])
    head = ["variant", "mean", *REGIONS, "1", "2", "3", "4", "inversions, %", "seeds", "steps", "ms/step", *CHANGE]
    return table(head, rows)


def _cells(results: Sequence[Result]) -> list[str]:
    """Return means over subsets, regions, cases and seeds; by number of modalities; inversions; number of seeds."""
    told, names = statistics(results), results[0].subsets
    spread = f" ± {told['sd']:.2f}" if told["seeds"] > 2 else ""  # of two values it says next to nothing
    dice = np.concatenate([r.dice for r in results], axis=2)  # every seed has as many cases
    of_count = [[index for index, name in enumerate(names) if name.count("+") == n] for n in range(4)]
    subsets = [parse_subset(name, cubes_specialists.CHANNELS) for name in names]
    lower = [dice[:, few] - dice[:, more] > 100 * MARGIN + 1e-6 for few, more in nested_pairs(subsets)]
    return [
        f"{told['mean']:.2f}{spread}{mark(results)}",
        *(f"{told[region]:.1f}" for region in REGIONS),
        *(f"{dice[:, indices].mean():.1f}" for indices in of_count),
        f"{100 * np.mean(lower):.1f}",
        str(told["seeds"]),
    ]


def _spent(run: Run) -> list[str]:
    """Return the steps of a run, and the measured milliseconds of one."""
    seconds = read_json(STEP_SECONDS)["seconds"][run.dataset][run.variant]["median"]
    return [str(run.options["num_epochs"] * run.options["num_iterations_per_epoch"]), f"{1e3 * seconds:.0f}"]
