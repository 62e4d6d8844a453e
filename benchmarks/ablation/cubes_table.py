"""Tables of the trainings on the cubes, from their result files.

    python benchmarks/ablation/cubes_table.py --label h100                    # on the test patients
    python benchmarks/ablation/cubes_table.py --label cuda --on validation    # what choices may look at

Runs are compared within a label, a budget (steps, or the time of so many steps of a reference) and a number of training
patients; differences to the baseline are paired by seed and patient, with 95 % bootstrap intervals over patients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import cubes_specialists
from cubes_variants import STEP_SECONDS

from nnunetv2_mgml.scoring.regions import short_name
from nnunetv2_mgml.scoring.statistics import bootstrap_interval

RESULTS = Path(__file__).parent / "results" / "cubes"
BASELINE = "baseline"
BASELINES = (BASELINE, f"{BASELINE}:modality_decoder_scale=0")
"""The baseline, and what it was before its modality decoder ended at half the resolution."""
PAIRS = (("conditional_dropout", "modality_dropout"),)
"""Variants that are compared with each other as well, below a table."""
KEYS = {"test": ("test", "dice"), "validation": ("validation", "validation_dice")}
"""Where a result has its means, and Dice per patient."""
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="folder below results/cubes")
    parser.add_argument("--on", choices=KEYS, default="test", help="which patients")
    parser.add_argument("--baseline", help="variant that differences are taken to (default: the baseline)")
    args = parser.parse_args()
    print(tables(read(args.label), args.on, args.baseline))


def read(label: str) -> list[Result]:
    """Return the results below a label; a variant's name does not say on what data it is, since groups do."""
    return [within_group(json.loads(file.read_text())) for file in sorted((RESULTS / label).glob("*.json"))]


def within_group(result: Result) -> Result:
    """Return a result whose variant is called as in a table of trainings on the same data (`regime`)."""
    variant, _, changes = result["variant"].partition(":")
    kept = ",".join(change for change in changes.split(",") if not change.startswith(("patients=", "lacking=")))
    return {**result, "variant": f"{variant}:{kept}" if kept else variant}


def budgets(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Group results that can be compared, by what they may spend."""
    grouped: dict[tuple[int, str | None, str], list[Result]] = {}
    for result in results:
        key = (result["nominal_steps"], result["equal_time"], regime(result))
        grouped.setdefault(key, []).append(result)
    found: dict[str, list[Result]] = {}
    for (steps, reference, data), chosen in grouped.items():
        if reference:  # a limit in seconds shortens all schedules alike: what counts is what the reference really did
            done = sorted({r["steps"] for r in chosen if r["variant"] == reference}) or [steps]
            words = f"the time of {' to '.join(map(str, dict.fromkeys((done[0], done[-1]))))} steps of {reference}"
        else:
            words = f"{steps} steps"
        words += f", {data}" if data else ""
        found.setdefault(words, []).extend(chosen)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))  # the table with most first


def regime(result: Result) -> str:
    """Return in words what data a run was trained on; empty: all patients, and all that they have."""
    training = result.get("training", {})
    words = [f"{training['patients']} patients to train"] if training.get("patients") else []
    return ", ".join([*words, *(["patients that lack modalities"] if training.get("lacking") else [])])


def headline_budget() -> tuple[str, list[Result]]:
    """Return the budget that headline and goals are of, in words, and its runs.

    The largest of equal time on the cubes, all patients to train, that was scored on test patients; of those with
    specialists, where there are any.
    """
    results = _scored()
    if not results:
        return "", []
    alone = [r for r in results if cubes_specialists.of_subset(r["variant"])]
    largest = max(alone or results, key=_seconds)
    [(budget, chosen)] = budgets(_like(results, largest)).items()
    return f"{budget}, {largest['device']}", chosen


def with_budget_times(factor: float, chosen: Sequence[Result]) -> list[Result]:
    """Return the runs whose budget of equal time is so many times that of some other runs, on the same device."""
    if not chosen:
        return []
    return _like(_scored(), {**chosen[0], "nominal_steps": chosen[0]["nominal_steps"] * factor})


def _scored() -> list[Result]:
    results = [r for folder in sorted(RESULTS.iterdir()) for r in read(folder.name)] if RESULTS.is_dir() else []
    return [r for r in results if "test" in r and r["equal_time"] and not regime(r)]


def _like(results: Iterable[Result], one: Result) -> list[Result]:
    return [r for r in results if all(r[key] == one[key] for key in ("device", "nominal_steps", "equal_time"))]


def _seconds(result: Result) -> float:
    return float(seconds_per_step(result) * result["steps"])


def tables(results: Sequence[Result], on: str, baseline: str | None = None) -> str:
    """Return a Markdown table per budget; runs without scores on these patients are left out.

    Args:
        results: of one label.
        on: see `KEYS`.
        baseline: variant that differences are taken to; None: the first of `BASELINES` that a budget has.
    """
    parts = []
    for words, chosen in budgets(r for r in results if KEYS[on][0] in r).items():
        devices = ", ".join(sorted({r["device"] for r in chosen}))
        head = f"{words[0].upper()}{words[1:]}, {on} patients, {devices}; {_commits(chosen)}."
        known = {r["variant"] for r in chosen}
        reference = baseline or next((name for name in BASELINES if name in known), BASELINE)
        parts.append(f"{head}\n\n{_table(chosen, on, reference)}")
        alone = cubes_specialists.table(chosen, *KEYS[on])
        if alone:
            parts.append(f"Networks trained on one subset alone, in the same time, and one model for all.\n\n{alone}")
    return "\n".join(parts) or "No finished runs yet.\n"


def _commits(results: Sequence[Result]) -> str:
    """Return on which code runs were trained."""
    marked = {f"{r['commit'][:9]}{'*' if r['code_changed'] else ''}" for r in results}
    stars = " (* with uncommitted changes)" if any(name.endswith("*") for name in marked) else ""
    return f"commit{'s' * (len(marked) > 1)} {', '.join(sorted(marked))}{stars}"


def _table(results: Sequence[Result], on: str, baseline: str) -> str:
    regions = [short_name(region) for region in results[0][KEYS[on][1]]]
    head = ["variant", "mean", *regions, "1", "2", "3", "4", "inversions, %", "seeds", "steps", "ms/step", "s"]
    head += ["difference", "95 % interval", "per seed"]
    reference = [r for r in results if r["variant"] == baseline]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant in dict.fromkeys(r["variant"] for r in results if not cubes_specialists.of_subset(r["variant"])):
        chosen = [r for r in results if r["variant"] == variant]
        cells = [f"`{variant}`", *_cells(summary(chosen, on)), *_change(reference, chosen, on)]
        lines.append(f"| {' | '.join(cells)} |")
    for variant, other in PAIRS:
        both = [[r for r in results if r["variant"] == name] for name in (other, variant)]
        if all(both) and (change := _change(*both, on))[0] != "-":
            lines.append(
                f"\n`{variant}` against `{other}`: {change[0]}, 95 % interval {change[1]}; per seed {change[2]}."
            )
    return "\n".join(lines) + "\n"


def _cells(told: dict[str, Any]) -> list[str]:
    spread = f" ± {told['sd']:.2f}" if told["seeds"] > 2 else ""  # of two values it says next to nothing
    counts = [f"{told['by_count'][n]:.1f}" if n in told["by_count"] else "-" for n in "1234"]
    inversions = "-" if told["inversions"] is None else f"{told['inversions']:.1f}"
    return [
        f"{told['mean']:.2f}{spread}",
        *(f"{value:.1f}" for value in told["regions"].values()),
        *counts,
        inversions,
        str(told["seeds"]),
        str(told["steps"]),
        f"{1e3 * told['seconds_per_step']:.1f}",
        f"{told['seconds']:.3g}",
    ]


def summary(results: Sequence[Result], on: str) -> dict[str, Any]:
    """Return means over the seeds of a variant, in percent, and the standard deviation of their means."""
    told = [r[KEYS[on][0]] for r in results]
    means = [t["mean"] for t in told]
    inversions = [t["inversions"] for t in told if t["inversions"] is not None]

    def mean_of(key: str) -> dict[str, float]:
        return {name: statistics.mean(t[key][name] for t in told) for name in told[0][key]}

    return {
        "mean": statistics.mean(means),
        "sd": statistics.stdev(means) if len(means) > 1 else None,
        "seeds": len(means),
        "regions": {short_name(name): value for name, value in mean_of("regions").items()},
        "by_count": mean_of("by_count"),
        "inversions": statistics.mean(inversions) if inversions else None,
        "steps": round(statistics.mean(r["steps"] for r in results)),
        "seconds_per_step": statistics.median(map(seconds_per_step, results)),
        "seconds": statistics.median(map(_seconds, results)),
    }


def seconds_per_step(result: Result) -> float:
    """Return what a step takes while nothing else runs.

    On a CPU, whose runs go side by side, what their equal time went by; the first results do not say it, but it follows
    from their steps and from the reference's in the table.
    """
    given = result.get("seconds_per_step")
    own = float(result["seconds_per_step_alone"] if given is None else given)
    if given is not None or not (result["equal_time"] and result["device"].startswith("CPU")):
        return own
    table = json.loads(STEP_SECONDS.read_text())["seconds"] if STEP_SECONDS.is_file() else {}
    reference = table.get(result["equal_time"])
    return reference["median"] * result["nominal_steps"] / result["steps"] if reference else own


def dice(result: Result, on: str) -> np.ndarray:
    """Return Dice in percent, ``(R, S, N)``."""
    return 100 * np.array([list(subsets.values()) for subsets in result[KEYS[on][1]].values()])


def difference(
    reference: Sequence[Result], results: Sequence[Result], on: str
) -> tuple[np.ndarray, list[float]] | None:
    """Return a variant minus the reference, per patient (mean over seeds both have) and per seed; None without any."""
    by_seed = {r["seed"]: r for r in reference}
    pairs = [(by_seed[r["seed"]], r) for r in results if r["seed"] in by_seed]
    if not pairs or any(dice(a, on).shape != dice(b, on).shape for a, b in pairs):
        return None
    changes = [dice(b, on) - dice(a, on) for a, b in pairs]
    return np.mean(changes, axis=(0, 1, 2)), [float(change.mean()) for change in changes]


def _change(reference: Sequence[Result], results: Sequence[Result], on: str) -> list[str]:
    found = None if results[0] in reference else difference(reference, results, on)
    if found is None:
        return ["-", "-", "-"]
    per_patient, per_seed = found
    low, high = bootstrap_interval(per_patient)
    return [
        f"{per_patient.mean():+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        " ".join(f"{value:+.2f}" for value in per_seed),
    ]


if __name__ == "__main__":
    main()
