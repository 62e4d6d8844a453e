"""The text of docs/results.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import cubes_goals
import cubes_specialists
import cubes_table
import numpy as np
from collect import Difference, Result, difference, select, statistics

PAPER = {
    "baseline": (83.90, 73.97, 57.07),
    "consistency": (84.70, 75.79, 58.24),
    "meta_amf": (85.35, 76.67, 59.82),
    "fixed_soft_labels": (85.15, 76.28, 59.43),
    "mgml_paper_terms": (86.31, 77.08, 60.38),
}
"""WT, TC, ET of the paper's Tables 1 and 2 (mmFormer, BraTS2020)."""
PAPER_TEMPERATURE = {"2": 76.16, "4": 76.14, "6": 76.21, "8": 76.19, "10": 76.15}
PAPER_LAMBDA3 = {"0.001": 76.14, "0.01": 76.21, "0.1": 76.19}
REGIONS = ("WT", "TC", "ET")


def page(settings: dict[str, Any], results: Sequence[Result]) -> str:
    """Return the page; sections without results say so."""
    sections = [
        _head(results),
        _cubes(),
        _goals(results),
        _phantoms(settings, results),
        _main(results),
        _subsets(results),
        _designs(settings, results),
        _headroom(results),
        _readings(settings, results),
        _sensitivity(results),
        _real(settings, results),
        FULL_SIZE,
    ]
    return "\n".join(sections)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, or a line saying that there is nothing yet."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return "No finished runs yet.\n"
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) + "\n"


def change_cells(change: Difference | None) -> list[str]:
    """Return difference, interval and values per seed."""
    if change is None:
        return ["-", "-", "-"]
    return [
        f"{change.mean:+.2f}",
        f"{change.low:+.2f} to {change.high:+.2f}",
        " ".join(f"{value:+.2f}" for value in change.per_seed),
    ]


def mark(results: Sequence[Result]) -> str:
    """Return the signs that belong behind figures of these results, after a space each; empty where there are none."""
    return " †" * any(r.of_old_design for r in results) + " ‡" * any(r.in_float32 for r in results)


def mean_cells(results: Sequence[Result]) -> list[str]:
    """Return mean with spread, marked where a design was another one, the regions, and the number of seeds."""
    values = statistics(results)
    spread = f" ± {values['sd']:.2f}" if values["seeds"] > 2 else ""  # of two values it says next to nothing
    return [
        f"{values['mean']:.2f}{spread}{mark(results)}",
        *(f"{values[region]:.2f}" for region in REGIONS),
        str(values["seeds"]),
    ]


def _head(results: Sequence[Result]) -> str:
    return f"""# Does MGML help? What two cores can say

Made by `python benchmarks/ablation/report.py` from result files in `benchmarks/ablation/results/` ({len(results)} of
the plugin's own commands, the rest of the cubes); never edited by hand. Cubes of real patients come first, at equal
training time; synthetic cases and eleven whole brains [after them](#synthetic-patients-at-equal-steps), at equal steps.
**No training here has converged.** Every interval is a 95 % bootstrap over the held-out cases, for the networks that
were trained: what another seed would change it does not say. For that look at the differences *per seed*, where there
are several; ± is the standard deviation over three seeds or more.

**{_headline()}
"""


def _headline() -> str:
    """Return how far specialists are ahead of one model."""
    gap = cubes_specialists.gap(cubes_table.largest()[1])
    if gap is None:
        return "No network was trained on one subset alone yet**, to hold the one model against."
    subsets = gap["subsets"]
    worst, best = max(subsets, key=subsets.get), min(subsets, key=subsets.get)
    return (
        f"One model instead of fifteen costs {gap['mean']:.1f} points of Dice**: the mean over {len(subsets)} of 15\n"
        f"subsets for which a network was trained alone, as long as the one model (`{gap['model']}` below); most on\n"
        f"{worst} ({subsets[worst]:.1f}), least on {best} ({subsets[best]:.1f}). Fifteen models take fifteen times its "
        "training and its disk."
    )


def _phantoms(settings: dict[str, Any], results: Sequence[Result]) -> str:
    data, training = settings["datasets"]["phantom"], settings["training"]["phantom"]
    training_part, validation, test = data["split"].split(":")
    steps = training["num_epochs"] * training["num_iterations_per_epoch"]
    hours = sum(sum(r.content["hours"].values()) for r in results)
    commits = (
        ", ".join(sorted({r.content["commit"][:9] + ("*" if r.content["code_changed"] else "") for r in results}))
        or "-"
    )
    shape, patch = ("x".join(map(str, sizes)) for sizes in (data["shape"], training["patch_size"]))
    difficulty = ", ".join(f"{key} {value:g}" for key, value in data["difficulty"].items())
    used = ", ".join(f"{key} {_versions(results, key)}" for key in ("torch", "nnunetv2", "nnunetv2_mgml"))
    return f"""## Synthetic patients, at equal steps

Every run is the plugin's own commands (`benchmarks/ablation/run.py`), settings are in
`benchmarks/ablation/settings.json`. **These are small experiments, all but [eleven patients](#real-cases) on synthetic
cases**: they
show whether the implementation does what it should and which readings of the paper are harmful, not what MGML gains on
BraTS. **All comparisons are at equal steps of short trainings**, which are far from converged: whatever makes a step do
more work looks like a better method there. {_old_rows(settings, results)}

Phantoms: {training_part} for training, {validation} for validation, {test} held out, {shape} voxels of
{data["spacing_mm"][0]:g} mm, difficulty {difficulty}. Training: {steps} steps of batch {training["batch_size"]}, patch
{patch}, Adam {training["initial_lr"]:g}, bfloat16 on a CPU (float32 where marked ‡: that
processor had no bfloat16 instructions), one thread. Prediction without mirroring. Dice in percent,
mean over 15 subsets and the cases; empty-case policy of BraTS, and a predicted ET below 0.5 ml counts as none (the rule
of the RFNet family: without it the cases without ET, right or wrong by one voxel, drown everything else). Together
{hours:.1f} core-hours; commits {commits} (* with uncommitted changes); {used}.

![differences per subset and design](images/results.png)
"""


def _old_rows(settings: dict[str, Any], results: Sequence[Result]) -> str:
    """Return what the rows of old designs are; empty where there are none."""
    old = {r.run.design for r in results if r.of_old_design}
    changed = "; ".join(f"`{design}`: {what}" for design, what in settings["changed_designs"].items() if design in old)
    return (
        "Rows marked † were trained before their fusion design changed (`fusion_revision=1`); they have no difference "
        "to a baseline that was trained again. `python benchmarks/ablation/run.py --changed` trains them again"
        f"{_open_hours(results)}. Changed: {changed}."
        if old
        else ""
    )


def _versions(results: Sequence[Result], library: str) -> str:
    """Return the versions of a library that results were computed with."""
    return " and ".join(sorted({r.content["versions"].get(library, "?") for r in results})) or "-"


def _open_hours(results: Sequence[Result]) -> str:
    """Return a clause on what training the rows of old designs again would take; empty where there are none."""
    old = [r for r in results if r.of_old_design]
    hours = sum(sum(r.content["hours"].values()) for r in old)
    return (
        f", {len(old)} runs of together {hours:.1f} core-hours at the first time; that has not been done" if old else ""
    )


def _rows(
    results: Sequence[Result], baseline: Sequence[Result], variants: Iterable[str], paper: bool = False
) -> Iterable[list[str]]:
    for variant in variants:
        chosen = [r for r in results if r.run.variant == variant]
        if chosen:
            change = difference(baseline, chosen) if variant != "baseline" else None
            cells = [f"`{variant}`", *mean_cells(chosen), *change_cells(change)]
            yield [*cells, *([f"{np.mean(PAPER[variant]):.2f}" if variant in PAPER else "-"] if paper else [])]


_CHANGE = ("difference", "95 % interval", "per seed")


def _main(results: Sequence[Result]) -> str:
    chosen = select(results, "main")
    order = dict.fromkeys(r.run.variant for r in chosen)
    rows = _rows(chosen, select(chosen, variant="baseline"), order, paper=True)
    return (
        "### The ablation (fusion `region_aware`)\n\n*Paper*: mean of WT, TC and ET in Tables 1 and 2 of Zou et al. "
        "(mmFormer on BraTS2020), figures of the paper. `mgml_paper_terms`: the paper's method, Meta-AMF and L_CR;"
        " `complete_view`: the baseline with nnU-Net's loss on the prediction from all modalities; `mgml`, our "
        "default (`nnUNetTrainerMGML`), has all three.\n\n"
        + table(["variant", "mean", *REGIONS, "seeds", *_CHANGE, "paper"], rows)
    )


def _subsets(results: Sequence[Result]) -> str:
    rows = []
    variants = ("modality_dropout", "baseline", "mgml_paper_terms", "mgml")
    found = {v: select(results, "main", variant=v) for v in variants}
    if all(found.values()):
        mean = {v: np.mean([r.dice for r in found[v]], axis=(0, 3)) for v in variants}
        for index, subset in enumerate(found["baseline"][0].subsets):
            rows.append([subset, *(" / ".join(f"{x:.1f}" for x in mean[v][:, index]) for v in variants)])
    return "### Per subset\n\nWT / TC / ET, mean over seeds.\n\n" + table(
        ["present", *(f"`{v}`{mark(found[v])}" for v in variants)], rows
    )


def _designs(settings: dict[str, Any], results: Sequence[Result]) -> str:
    chosen = select(results, "designs")
    special = "; ".join(
        f"`{design}` with " + ", ".join(f"`{key}={value}`" for key, value in options.items())
        for design, options in settings["design_options"].items()
    )
    rows = []
    for design in dict.fromkeys(r.run.design for r in chosen):
        baseline, mgml = (select(chosen, design=design, variant=v) for v in ("baseline", "mgml"))
        change = difference(baseline, mgml)
        if change is not None:
            rows.append(
                [
                    f"`{design}`",
                    mean_cells(baseline)[0],
                    mean_cells(mgml)[0],
                    *change_cells(change)[:2],
                    " / ".join(f"{change.regions[r]:+.2f}" for r in REGIONS),
                    mean_cells(mgml)[-1],
                ]
            )
    return f"### MGML on the other fusion designs\n\nDefault options, but {special} to spare time.\n\n" + table(
        ["design", "baseline", "MGML", *_CHANGE[:2], "WT / TC / ET", "seeds"], rows
    )


def _headroom(results: Sequence[Result]) -> str:
    rows = []
    for result in select(results, "headroom"):
        subset = result.run.subsets[0]
        shared = [r for r in select(results, "main", variant="baseline") if r.run.seed == result.run.seed]
        if shared:
            of_all = shared[0].dice[:, shared[0].subsets.index(subset)].mean(1)
            alone = result.dice[:, 0].mean(1)
            rows.append(
                [
                    subset,
                    " / ".join(f"{x:.1f}" for x in alone) + mark([result]),
                    " / ".join(f"{x:.1f}" for x in of_all) + mark(shared[:1]),
                    f"{alone.mean() - of_all.mean():+.2f}" if result.of_old_design == shared[0].of_old_design else "-",
                ]
            )
    return (
        "### Headroom\n\nA network trained on one subset only, for the same number of steps, against the baseline "
        "for all subsets: what a better training could gain at most. WT / TC / ET.\n\n"
        + table(["subset", "trained on it alone", "baseline", "headroom"], rows)
    )


def _readings(settings: dict[str, Any], results: Sequence[Result]) -> str:
    chosen = [r for group in ("readings", "teaching") for r in select(results, group)]
    baseline = select(results, "main", variant="baseline")
    rows = [
        [*row[:9], f"`{_set(settings, chosen, row[0])}`"]
        for row in _rows(chosen, baseline, dict.fromkeys(r.run.variant for r in chosen))
    ]
    return (
        "### Readings of the losses and other choices that were tried\n\nEach against the baseline of the same "
        "seeds, without the complete view. One seed tells harmful from harmless, not good from better. `teaching` "
        "is not in the paper ([method.md](method.md)).\n\n"
        + table(["run", "mean", *REGIONS, "seeds", *_CHANGE, "set"], rows)
    )


def _set(settings: dict[str, Any], results: Sequence[Result], cell: str) -> str:
    """Return the options of a variant beyond those of every training."""
    run = next(r.run for r in results if f"`{r.run.variant}`" == cell)
    common = {**settings["training"][run.dataset], "fusion": run.design, "seed": run.seed}
    return " ".join(f"{k}={v}" for k, v in run.options.items() if k not in common or common[k] != v)


_SENSITIVITY: tuple[tuple[str, str, dict[str, float], str], ...] = (
    ("tau", "mgml_paper_terms", PAPER_TEMPERATURE, "temperature"),
    ("lambda3", "mgml_paper_terms", PAPER_LAMBDA3, "consistency_weight"),
    ("complete_view_weight", "mgml", {}, "complete_view_weight"),
)
"""Title and group, the variant of the main table with the default, the paper's figures, and the option."""


def _sensitivity(results: Sequence[Result]) -> str:
    parts = [
        "### Sensitivity\n\nThe rows of a table have the same seeds. *One modality*: mean over the four subsets of "
        "one modality. *Paper*: mean of WT, TC and ET in Tables 5 and 6. The weight of the loss on the complete "
        "view is not the paper's; at 0 it is `mgml_paper_terms`.\n"
    ]
    for title, variant, known, option in _SENSITIVITY:
        found = defaultdict(dict)
        defaults = [r for r in select(results, "main") if r.run.variant in (variant, "mgml_paper_terms")]
        for result in (*defaults, *select(results, option)):
            found[_value(result, option)][result.run.seed] = result
        seeds = set.intersection(*(set(by_seed) for by_seed in found.values())) if found else set()
        rows = {value: [by_seed[seed] for seed in sorted(seeds)] for value, by_seed in found.items()} if seeds else {}
        parts.append(
            table(
                [title, "mean", *REGIONS, "seeds", "one modality", "paper"],
                (
                    [
                        f"{value:g}",
                        *mean_cells(chosen),
                        f"{np.mean([_one_modality(r) for r in chosen]):.2f}",
                        f"{known[f'{value:g}']:.2f}" if f"{value:g}" in known else "-",
                    ]
                    for value, chosen in sorted(rows.items())
                ),
            )
        )
    return "\n".join(parts)


def _value(result: Result, option: str) -> float:
    """Return the value of an option in a run, the trainer's default where it was not set."""
    return float(result.run.config.value(option))


def _one_modality(result: Result) -> float:
    """Return the mean Dice over the subsets of a single modality."""
    return float(result.dice[:, ["+" not in subset for subset in result.subsets]].mean())


def _real(settings: dict[str, Any], results: Sequence[Result]) -> str:
    data, training = settings["datasets"]["real"], settings["training"]["real"]
    chosen = select(results, "real")
    folds = len({r.run.fold for r in chosen})
    rows = _rows(chosen, select(chosen, variant="baseline"), dict.fromkeys(r.run.variant for r in chosen))
    return (
        f"### Real cases\n\nThe eleven BraTS cases of `MGML_REAL_DATA` at {data['spacing_mm'][0]:g} mm, {folds} of "
        f"{data['folds']} cross-validation folds (7 or 8 training cases each), "
        f"{training['num_epochs'] * training['num_iterations_per_epoch']} steps of batch "
        f"{training['batch_size']}. Far too few cases and steps to judge the method; published models were "
        f"trained on these cases too.\n\n" + table(["variant", "mean", *REGIONS, "seeds", *_CHANGE], rows)
    )


def _cubes() -> str:
    labels = sorted(path.name for path in cubes_table.RESULTS.iterdir()) if cubes_table.RESULTS.is_dir() else []
    found = {label: cubes_table.tables(cubes_table.read(label), "test") for label in labels}
    heads = {
        label: _CUBES_ON.get(label, f"### {label}").format(gains=_gains(label), left=_left(label)) for label in labels
    }
    parts = [f"{heads[label]}\n{tables}" for label, tables in found.items()]
    return "\n".join([_CUBES, *(parts or ["No finished runs yet.\n"])])


def _goals(results: Sequence[Result]) -> str:
    budget, chosen = cubes_table.largest()
    brains = select(results, "real")
    change = difference(*(select(brains, variant=name) for name in (cubes_table.BASELINE, cubes_goals.DEFAULT)))
    table_of_goals = cubes_goals.table(chosen, change) if chosen else "No finished runs yet.\n"
    return f"{_GOALS.format(budget=budget)}\n{table_of_goals}\n{_WHY}"


def _gains(label: str) -> str:
    """Return by how much each training of the baseline got better in its last third, on validation patients."""
    curves = [r["curve"] for r in cubes_table.read(label) if r["variant"] == cubes_table.BASELINE]
    gains = [curve[-1]["mean"] - _at(curve, 2 / 3 * curve[-1]["step"]) for curve in curves if curve]
    return " and ".join(f"{gain:.1f}" for gain in gains)


def _left(label: str) -> str:
    """Return how many subsets have no specialist yet, as the end of a sentence."""
    alone = cubes_specialists.specialists(cubes_table.read(label), cubes_goals.SPECIALISTS)
    left = 2 ** len(cubes_specialists.CHANNELS) - 1 - len(alone)
    return f"; {left} subsets have not been trained yet" if left else ""


def _at(curve: Sequence[dict[str, Any]], step: float) -> float:
    return float(np.interp(step, [point["step"] for point in curve], [point["mean"] for point in curve]))


_CUBES = """## Real cubes at equal time

Cubes of 32^3 voxels around the largest lesion of 288 patients of BraTS 2020, split once by a seed into 192 patients for
training, 36 for validation and 60 for testing (`benchmarks/ablation/cubes_data.py`). Choices rest on validation
patients. The whole table, with a specialist for each of the 15 subsets, on a cluster:
`benchmarks/ablation/cubes.sbatch`, an array of jobs; the command that collects what they wrote stands in it.
"""
_CUBES_ON = {
    "cpu": """### On one core of a CPU

`python benchmarks/ablation/cubes_seconds.py` timed the steps in turns on the idle machine, an Intel Xeon with bfloat16
instructions (`results/cubes_seconds.json`; column *s*: steps times that); then `cubes.py --variants ... --steps 4000
--equal_time baseline --test`, most with `--points 6`.
Patches of 24^3, batch 2, 4 stages, Adam 0.002, weight decay 1e-4; encoders at a quarter, the stock network at half of
nnU-Net's widths (1.17 and 1.40 million parameters), without gradient checkpointing, which would cost our networks about
a tenth of their steps. None of these is converged: in the last third the baseline still gained {gains} points on
validation patients. Differences are over the seeds that both have, so they need not be those of the means beside them.
`conditional_dropout` is `nnUNetTrainerModalityDropout_conditional`, the stock network whose norms know what is visible:
ahead of the same network without in every seed and for every number of modalities, in tumour core and enhancing tumour
but not in whole tumour. The idea was chosen on validation patients at half the steps (68.9 against 67.5, one seed;
those two results were not kept). With twice the learning rate it ended at 67.5 there (on an EPYC). `early_fusion` is
`mgml plan --preset early-fusion`.
A specialist is the stock network that sees one subset in every step, trained as long as the one model sees all of them
(`--variants modality_dropout:only=t1+t2`): fifteen take fifteen times the training and the weights. **They are ahead**,
most where least is there{left}. Nine of them were trained on an AMD EPYC, the other six and the models for all
subsets on the Xeon; both compute in bfloat16. At a budget at which nobody has converged, a
subset that gets one step of fifteen is learned later; what remains of the gap with more steps is not known.

![Dice against training time, and of one model beside one for each subset](images/cubes.png)
""",
    "h200": """### On a shared GPU

`python benchmarks/ablation/cubes.py --device cuda --variants baseline mgml paper_terms modality_dropout --seeds 0 1 2
--steps 6000 --equal_time baseline --seconds 310 --test`. All runs shared one card, so the budget was cut to what
fitted; **none of these trainings is converged**. A step of four narrow encoders takes four times as long there as one
of the stock network, even as a CUDA graph. So the stock network does more steps in the same time and is far ahead, and
the default, with the most work in a step, is behind its own baseline. **The stock network got two thirds of the time
only** (column *s*): the script of then gave nobody more than three times the baseline's steps, so its lead is told too
small. More in [gpu.md](gpu.md).
""",
}
"""What stands before the tables of a label of results/cubes."""


_GOALS = """### Beside what was to be shown

Points of mean Dice on the test patients of the cubes, with 95 % intervals; the time of the baseline: on validation
patients, between two points of the curve; {budget}. The goals are for trainings that have converged, which these have
not, and of three seeds. Differences and inversions are over the seeds that both have. *Whole brains*: the table of
[real cases](#real-cases), eleven patients and one seed, and at equal steps instead of equal time. *Open*: what was
measured does not decide it.
"""
_WHY = """Why so many are missed: every curve still rises, so we take it that what decides is how many steps fit into
the time (the cubes were not trained at equal steps to tell), and the default fits the fewest (columns *steps* and
*ms/step*): four encoders instead of one, and a second view of every case. What the view brings with all modalities it
loses with one of them. The stock network takes the most steps, so its dropout is the strongest rival. A specialist
takes as many steps, all on its own subset. On the CPU larger subsets that score lower are rarer with the default (two
seeds; on the H200 they are not), and more frequent with the stock networks, which are better everywhere.
"""

FULL_SIZE = """## At full size

**Not run here.** With BraTS2020 or BraTS2023 and a GPU the same comparison is, without any change to the code:

```bash
mgml convert brats /path/to/BraTS2020 -d 137 --split rfnet2020    # the cases of the published tables
nnUNetv2_plan_and_preprocess -d 137 -c 3d_fullres
mgml plan -d 137 --preset paper
for T in nnUNetTrainerMGML_baseline nnUNetTrainerMGML_noMetaAMF nnUNetTrainerMGML_noConsistency nnUNetTrainerMGML \\
        nnUNetTrainerModalityDropout nnUNetTrainerModalityDropout_conditional; do
    nnUNetv2_train 137 3d_fullres 0 -tr $T -p nnUNetMGMLPlans
    mgml evaluate -d 137 -c 3d_fullres -f 0 -tr $T -p nnUNetMGMLPlans -o evaluation/$T \\
        -i $nnUNet_raw/Dataset137_BraTS2020/imagesTs -l $nnUNet_raw/Dataset137_BraTS2020/labelsTs
done
mgml compare evaluation/nnUNetTrainerMGML_baseline evaluation/nnUNetTrainerMGML -o evaluation/comparison
```

The preset switches the loss on the complete view off. Plans of another name add a row for it: `mgml plan -d 137
--preset paper --set complete_view_weight=1 --plans_name nnUNetMGMLPlans_complete`, then `-p` with that name and another
`-o`; `--set fusion=mmformer` in the same way repeats everything for another design. Expected, not measured: the paper
trains 900 epochs of 150 steps at batch 1 on 80x80x80 patches, 66 to 77 s an epoch for RFNet on an RTX 3090 (Table 7):
17 to 19 hours a run. [memory.md](memory.md) counts what a step keeps in memory, per fusion design and at two sizes, and
`mgml plan -d 137 --gpu_memory` predicts what yours needs. [costs.md](costs.md) has the time of a training step on a
CPU, per fusion design.
"""
