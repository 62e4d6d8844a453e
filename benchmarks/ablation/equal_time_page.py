"""What the results page says of the cubes, at equal time, and of the goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cubes_goals
import cubes_specialists
import cubes_table
import numpy as np
import whole_volume_page
from collect import Result, difference, select
from page_tables import table

from nnunetv2_mgml.scoring.statistics import bootstrap_interval


def headline() -> str:
    """Return how far specialists are ahead of one model, of the same training and of the longest."""
    chosen = cubes_table.headline_budget()[1]
    gap = cubes_specialists.gap(chosen)
    if gap is None:
        return "No network was trained on one subset alone yet**, to hold the one model against."
    subsets = gap["subsets"]
    worst, best = max(subsets, key=subsets.get), min(subsets, key=subsets.get)
    return (
        f"One model instead of fifteen costs {gap['mean']:.1f} points of Dice** where it is trained as long as each of "
        f"them: the mean\nover {len(subsets)} of 15 subsets for which a network was trained alone "
        f"(`{gap['model']}` below), most on {worst} ({subsets[worst]:.1f}), least on\n{best} ({subsets[best]:.1f}). "
        f"Fifteen models take fifteen times its training and its disk.{_with_more_training(chosen)}"
    )


def _with_more_training(chosen: Sequence[dict[str, Any]]) -> str:
    """Return what the one model is where it has the most of the specialists' training; empty where it has no more."""
    words = []
    for model, name in ((cubes_goals.BEST, "it"), (cubes_goals.DEFAULT, "the plugin's default")):
        longer = [row for row in _beside_specialists(chosen, model) if row.factor > 1]
        if longer:
            low, high = sorted(-value for value in bootstrap_interval(longer[-1].ahead))
            mean, seeds = longer[-1].ahead.mean(), longer[-1].told["seeds"]
            verb = "behind" if mean > 0 else "ahead of"
            words.append(
                f" **Trained for {longer[-1].factor:g} of these fifteen\ntrainings {name} is {verb} them by "
                f"{abs(mean):.1f}** (95 % interval {low:+.1f} to {high:+.1f}, {seeds} seed{'s' * (seeds > 1)})."
            )
    return "".join(words)


class _Beside(NamedTuple):
    """One model of some budget beside the specialists of the headline's."""

    factor: float
    """Its training time as a multiple of a specialist's."""
    told: dict[str, Any]
    """See `cubes_table.summary`."""
    ahead: np.ndarray
    """See `cubes_specialists.ahead`."""


def _beside_specialists(chosen: Sequence[dict[str, Any]], model: str = cubes_goals.BEST) -> list[_Beside]:
    alone = cubes_specialists.specialists(chosen, cubes_goals.SPECIALISTS)
    found = []
    for factor in (0.5, 1, 2, 4, 8, 15) if alone else ():
        runs = [r for r in cubes_table.with_budget_times(factor, chosen) if r["variant"] == model]
        if runs:
            ahead = cubes_specialists.ahead(alone, runs, cubes_table.KEYS[cubes_goals.ON][1])
            found.append(_Beside(factor, cubes_table.summary(runs, cubes_goals.ON), ahead))
    return found


def cubes() -> str:
    """Return the section on the cubes."""
    labels = sorted(path.name for path in cubes_table.RESULTS.iterdir()) if cubes_table.RESULTS.is_dir() else []
    found = {label: cubes_table.tables(cubes_table.read(label), "test") for label in labels}
    heads = {
        label: _CUBES_ON.get(label, f"### {label}").format(gains=_gains(label), left=_left(label)) for label in labels
    }
    parts = [f"{heads[label]}\n{tables}" for label, tables in found.items()]
    return "\n".join([_CUBES, *(parts or ["No finished runs yet.\n"]), *_longer(), *_tried()])


def _longer() -> list[str]:
    """Return the section on one model trained for shorter and longer than each specialist; empty without any."""
    chosen, rows = cubes_table.headline_budget()[1], []
    for model in (cubes_goals.BEST, cubes_goals.DEFAULT):
        for factor, told, ahead in _beside_specialists(chosen, model):
            low, high = bootstrap_interval(ahead)
            cells = [f"{told['mean']:.2f}", *(f"{told['by_count'][n]:.1f}" for n in "1234")]
            change = [
                f"{told['inversions']:.1f}",
                str(told["seeds"]),
                f"{ahead.mean():+.2f}",
                f"{low:+.2f} to {high:+.2f}",
            ]
            rows.append([f"`{model}`", f"{factor:g}", f"{told['seconds'] / 60:.0f}", *cells, *change])
    if len(rows) < 2:
        return []
    head = ["model", "times a specialist's training", "minutes", "mean", "1", "2", "3", "4", "inversions, %", "seeds"]
    return [
        "### One model trained for shorter and longer\n\nOn one core of a CPU, beside the same specialists. All "
        "fifteen of them take fifteen times the training of one; what each would gain of more was not measured."
        f"{_at_equal_steps(chosen)}\n",
        table([*head, "specialists ahead", "95 % interval"], rows),
    ]


def _at_equal_steps(chosen: Sequence[dict[str, Any]]) -> str:
    """Return what the default and its best rival have at as many steps of their longest trainings, as a sentence."""
    for factor in (15, 8, 4, 2):
        runs = cubes_table.with_budget_times(factor, chosen)
        curves = [
            next((r["curve"] for r in runs if r["variant"] == name and r["curve"]), None)
            for name in (cubes_goals.DEFAULT, cubes_goals.BEST)
        ]
        if None in curves:
            continue
        step = min(curve[-1]["step"] for curve in curves)
        own, other = (_at(curve, step) for curve in curves)
        return (
            f" At equal *steps* of the longest trainings, {step}, the default has {own:.1f} and `{cubes_goals.BEST}` "
            f"{other:.1f} (validation patients, one seed); in equal time it does fewer."
        )
    return ""


def goals(results: Sequence[Result]) -> str:
    """Return the section on what was to be shown."""
    budget, chosen = cubes_table.headline_budget()
    brains = select(results, "brains")
    changes = {
        of_cubes: difference(select(brains, variant=whole_volume_page.BASELINE), select(brains, variant=name))
        for of_cubes, name in (
            (cubes_goals.DEFAULT, whole_volume_page.DEFAULT),
            (cubes_goals.BEST, f"{cubes_goals.BEST}_narrow"),
        )
    }
    half = cubes_table.with_budget_times(0.5, chosen)
    table_of_goals = cubes_goals.table(chosen, changes, half) if chosen else "No finished runs yet.\n"
    return f"{_GOALS.format(budget=budget)}\n{table_of_goals}\n{_WHY}"


def _tried() -> list[str]:
    """Return the section on what was changed about a variant, by validation patients; empty without any."""
    folders = sorted(cubes_table.RESULTS.iterdir()) if cubes_table.RESULTS.is_dir() else []
    results = [r for folder in folders for r in cubes_table.read(folder.name)]
    known = {_like(r, r["variant"]): r["validation"] for r in results}
    rows = []
    for r in results:
        variant, _, changes = r["variant"].partition(":")
        beside = known.get(_like(r, variant))
        if changes and not r["training"]["only"] and beside is not None:
            change = r["validation"]["mean"] - beside["mean"]
            budget = f"{r['nominal_steps']} steps" + (f" of {r['equal_time']}" if r["equal_time"] else " each")
            means = [f"{r['validation']['mean']:.2f}", f"{beside['mean']:.2f}", f"{change:+.2f}"]
            counts = [f"{r['validation']['by_count'][n] - beside['by_count'][n]:+.1f}" for n in "14"]
            rows.append([f"`{variant}`", f"`{changes}`", str(r["seed"]), budget, *means, *counts])
    if not rows:
        return []
    head = ["variant", "changed", "seed", "time of", "mean", "without", "difference", "one modality", "all four"]
    return [
        "### What was tried\n\nOn validation patients, at equal time, one training each or two: enough to leave "
        "what loses, not to adopt what wins. "
        f"{_CHANGES}\n",
        table(head, rows),
    ]


def _like(result: dict[str, Any], variant: str) -> tuple[Any, ...]:
    """Return what a run of a variant is found by that differs from a result in nothing else."""
    same = (result[key] for key in ("seed", "device", "nominal_steps", "equal_time"))
    return (variant, *same, cubes_table.regime(result))


def _gains(label: str) -> str:
    """Return by how much each training of the baseline got better in its last third, on validation patients.

    Those from all patients only.
    """
    results = cubes_table.read(label)
    curves = [r["curve"] for r in results if r["variant"] == cubes_table.BASELINE and not cubes_table.regime(r)]
    gains = [curve[-1]["mean"] - _at(curve, 2 / 3 * curve[-1]["step"]) for curve in curves if curve]
    words = [f"{gain:.1f}" for gain in gains]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


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
--equal_time baseline:modality_decoder_scale=0 --test`, most with `--points 6`.
Patches of 24^3, batch 2, 4 stages, Adam 0.002, weight decay 1e-4; encoders at a quarter, the stock network at half of
nnU-Net's widths (1.17 and 1.40 million parameters), without gradient checkpointing, which would cost our networks about
a tenth of their steps. None of these is converged: in the last third the baseline still gained {gains} points on
validation patients. Differences are over the seeds that both have, so they need not be those of the means beside them.
`conditional_dropout` is `nnUNetTrainerModalityDropout_conditional`, the stock network whose norms know what is visible:
ahead of the same network without in every seed and for every number of modalities, in tumour core and enhancing tumour
but not in whole tumour. The idea was chosen on validation patients at half the steps (68.9 against 67.5, one seed;
those two results were not kept). `early_fusion` is `mgml plan --preset early-fusion` at half of its width.
**The default is `mgml:conditional_norms=true,network_form=shared_encoder,complete_every=4`**: norms of fusion and
decoder know what is visible, one encoder serves all modalities (0.50 million parameters instead of 1.17), and what is
hidden takes part in every fourth step only. Networks of ours whose name does not say so have plain norms, an encoder
per modality and full steps only, as by default before.
With `modality_decoder_scale=0` the decoder shared by all modalities ends at full resolution, as published and as it did
by default when the time to spend was chosen; [at half of it](#what-was-tried) a step takes four fifths.
All budgets go by step times of before [training in bfloat16 got faster](speed.md#what-was-tried), by a sixth for our
networks and not at all for the stock network, and before two passes of the default were one batch, which takes another
tenth off its step; those of the shared encoder are today's, scaled by what `baseline:conditional_norms=true` takes
today and took then.
`meta_amf`, `consistency` and `paper_terms` are the paper's terms, alone and together, `complete_view` is our loss on
the prediction from all modalities alone: one seed each, and none is ahead of the baseline.
A specialist is the stock network that sees one subset in every step, trained as long as the one model sees all of them
(`--variants modality_dropout:only=t1+t2`): fifteen take fifteen times the training and the weights. **They are ahead**,
most where least is there{left}. Nine of them were trained on an AMD EPYC, the other six and the models for all
subsets on the Xeon; both compute in bfloat16. At a budget at which nobody has converged, a
subset that gets one step of fifteen is learned later: [with four times the
steps](#one-model-trained-for-shorter-and-longer) the one model is ahead of these specialists.
Further tables are of other data to train on. *30 patients*: as many steps, so six times the passes over each
(`--variants mgml:patients=30`). *Patients that lack modalities* (`:lacking=true`): each of the 192 lacks T1, T1ce,
FLAIR and T2 with a chance of 20, 40, 60 and 80 %, PASSION's protocol, once and for all; those for validation and test
have everything. There `passion` is the baseline with [PASSION's rebalancing](rebalancing.md), which hides nothing of
what a patient has, as published; the others draw subsets of it.

![Dice against training time, and of one model beside one for each subset](images/cubes.png)
""",
    "h200": """### On a shared GPU

`python benchmarks/ablation/cubes.py --device cuda --variants baseline mgml paper_terms modality_dropout --seeds 0 1 2
--steps 6000 --equal_time baseline --seconds 310 --test`, when the default still had an encoder
per modality, full steps only, plain norms and `modality_decoder_scale=0`. All runs shared one card, so the budget was
cut to what fitted; **none of these trainings is converged**. A step of four narrow encoders takes four times as long
there as one of the stock network, even as a CUDA graph. So the stock network
does more steps in the same time and is far ahead, and the default, with the most work in a step, is behind its own
baseline. **The stock network got two thirds of the time only** (column *s*): the script of then gave nobody more than
three times the baseline's steps, so its lead is told too small. More in [gpu.md](gpu.md).
""",
}
"""What stands before the tables of a label of results/cubes."""


_CHANGES = (
    "`learning_rate`: twice that of all others. `complete_first=0.3`: a sample sees everything with a chance that "
    "falls from 1 to 0 over the first 30 % of the steps, a random subset else. `conditional=weights`: the "
    "convolutions of at most 60 000 weights linear in the mask too, as the norms are. The code of these two left "
    "again (commit b130b0e has it). `modality_decoder_scale=0`: the decoder shared by all modalities ends at full "
    "resolution, as published, for a quarter more time a step. That lost in every seed, on [whole "
    "brains](#whole-brains-at-equal-time) too, so it no longer is the default. "
    "`modality_decoder_weight=0`: nothing is taught to modalities alone. `teacher_scale=1`: the prediction from all "
    "modalities, and what is learned from it, ends at half the resolution, for an eighth less time a step. "
    "`conditional_norms=true`: the norms of fusion and decoder know what is visible, for a twentieth more time a step. "
    "Ahead in every seed so far, it is the default now; [whole brains](#whole-brains-at-equal-time) came after that. "
    "Two prototypes of it, at equal steps and not kept, had 66.8 (`mgml`) and 68.4 (`baseline`) at seed 0. "
    "`network_form=shared_encoder,complete_every=4`: one encoder for all modalities, and full steps every fourth time, "
    "for less time a step than the default before (0.62 by the columns *ms/step* above, which are of that default's "
    "code of then): the default now. Prototypes at equal time on this machine, seed 0, conditional norms, not kept: "
    "the shared encoder alone 69.1 without our terms (an encoder each "
    "67.4) and 65.7 with them in every step (66.6); full steps every fourth time alone 67.1; both 68.9. With a mean "
    "instead of `region_aware`, which takes three fifths of the time a step, 68.6 without our terms, 68.1 with them; "
    "with fusion and decoders as wide as the encoder 69.1 without."
)
_GOALS = """### Beside what was to be shown

Points of mean Dice on the test patients of the cubes, with 95 % intervals; {budget}. The
goals are for trainings that have converged, which these have not, and of three seeds. Differences and inversions are
over the seeds that both have. *Half of its time*: trainings of half as many steps beside the baseline, on validation
patients; where there are none, between which two points of its curve a variant was as good. *Whole brains*: the
[table above](#whole-brains-at-equal-time), one seed, `conditional_dropout_narrow` for `conditional_dropout`. *Open*:
what was measured does not decide it.
"""
_WHY = """Why so many are missed: every curve still rises, and what decides is how many steps fit into the time: at
equal steps the default is ahead of `conditional_dropout` ([longer
trainings](#one-model-trained-for-shorter-and-longer), where it also is closer at equal time), and it fits fewer than
the stock network (columns *steps* and *ms/step*): each modality is encoded alone, and a quarter of the steps see a
second view of every case. What the view brings with all modalities it loses with one of them. The stock network takes
the most steps, so its dropout is the strongest rival. A specialist takes as many steps, all on its own subset. On the
CPU larger subsets that score lower are rarer with the default (on the H200, with the default of then, they were not),
and more frequent with the stock networks, which are better everywhere there. On whole brains, at nnU-Net's widths, a
step of the stock network takes longer than the default's, and it is the other way round: the stock networks are far
behind all of ours. At half its width the stock network is level with the baseline there and behind the default, and
with norms that know what is visible ahead of the one and level with the other.
"""
