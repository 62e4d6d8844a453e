"""The text of docs/results.md; what is at equal time stands in `equal_time_page.py` and `whole_volume_page.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import equal_time_page
import numpy as np
import whole_volume_page
from collect import Result, difference, select
from page_tables import CHANGE, REGIONS, change_cells, mark, mean_cells, table, variant_rows

PAPER_TEMPERATURE = {"2": 76.16, "4": 76.14, "6": 76.21, "8": 76.19, "10": 76.15}
PAPER_LAMBDA3 = {"0.001": 76.14, "0.01": 76.21, "0.1": 76.19}


def page(settings: dict[str, Any], results: Sequence[Result]) -> str:
    """Return the page; sections without results say so."""
    sections = [
        _head(results),
        equal_time_page.cubes(),
        whole_volume_page.brains(settings, results),
        equal_time_page.goals(results),
        _phantoms(settings, results),
        _main(results),
        whole_volume_page.phantoms(settings, results),
        _subsets(results),
        _designs(settings, results),
        _headroom(results),
        _readings(settings, results),
        _sensitivity(results),
        _real(settings, results),
        FULL_SIZE,
    ]
    return "\n".join(sections)


def _head(results: Sequence[Result]) -> str:
    return f"""# Does MGML help? What two cores can say

Made by `python benchmarks/ablation/report.py` from result files in `benchmarks/ablation/results/` ({len(results)} of
the plugin's own commands, the rest of the cubes); never edited by hand. Real patients come first, cubes and whole
brains, at equal training time; synthetic cases [after them](#synthetic-patients-at-equal-steps), at equal steps.
**No training here has converged.** Every interval is a 95 % bootstrap over the held-out cases, for the networks that
were trained: what another seed would change it does not say. For that look at the differences *per seed*, where there
are several; ± is the standard deviation over three seeds or more.

**{equal_time_page.headline()}
"""


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
`benchmarks/ablation/settings.json`. **These are small experiments, all but
[eleven patients](#eleven-real-cases-at-equal-steps) on synthetic cases**: they show whether the implementation does
what it should and which readings of the paper are harmful, not what MGML gains on BraTS. **All comparisons but
[one table](#the-same-at-equal-time) are at equal steps of short trainings**, which are far from converged: whatever
makes a step do more work looks like a better method there. {_old_rows(settings, results)}

Phantoms: {training_part} for training, {validation} for validation, {test} held out, {shape} voxels of
{data["spacing_mm"][0]:g} mm, difficulty {difficulty}. Training: {steps} steps of batch {training["batch_size"]}, patch
{patch}, Adam {training["initial_lr"]:g}, bfloat16 on a CPU (float32 where marked ‡: that
processor had no bfloat16 instructions), one thread; the decoder shared by all modalities ends at full resolution
(`modality_decoder_scale=0`), with an encoder per modality, full steps only and plain norms, the default of then.
Prediction without mirroring. Dice in percent,
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


def _main(results: Sequence[Result]) -> str:
    chosen = select(results, "main")
    order = dict.fromkeys(r.run.variant for r in chosen)
    rows = variant_rows(chosen, select(chosen, variant="baseline"), order, paper=True)
    return (
        "### The ablation (fusion `region_aware`)\n\n*Paper*: mean of WT, TC and ET in Tables 1 and 2 of Zou et al. "
        "(mmFormer on BraTS2020), figures of the paper. `mgml_paper_terms`: the paper's method, Meta-AMF and L_CR;"
        " `complete_view`: the baseline with nnU-Net's loss on the prediction from all modalities; `mgml`, our "
        "default's terms (`nnUNetTrainerMGML`), has all three.\n\n"
        + table(["variant", "mean", *REGIONS, "seeds", *CHANGE, "paper"], rows)
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
    return f"### MGML on the other fusion designs\n\nOptions as above, but {special} to spare time.\n\n" + table(
        ["design", "baseline", "MGML", *CHANGE[:2], "WT / TC / ET", "seeds"], rows
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
        for row in variant_rows(chosen, baseline, dict.fromkeys(r.run.variant for r in chosen))
    ]
    return (
        "### Readings of the losses and other choices that were tried\n\nEach against the baseline of the same "
        "seeds, without the complete view. One seed tells harmful from harmless, not good from better. `teaching` "
        "is not in the paper ([method.md](method.md)).\n\n"
        + table(["run", "mean", *REGIONS, "seeds", *CHANGE, "set"], rows)
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
    rows = variant_rows(chosen, select(chosen, variant="baseline"), dict.fromkeys(r.run.variant for r in chosen))
    return (
        "### Eleven real cases, at equal steps\n\nThe BraTS cases of 2021 and 2023 of `MGML_REAL_DATA` at "
        f"{data['spacing_mm'][0]:g} mm, {folds} of "
        f"{data['folds']} cross-validation folds (7 or 8 training cases each), "
        f"{training['num_epochs'] * training['num_iterations_per_epoch']} steps of batch "
        f"{training['batch_size']}, the default of then as above. Far too few cases and steps to judge the method; "
        "published models were trained on these cases too.\n\n"
        + table(["variant", "mean", *REGIONS, "seeds", *CHANGE], rows)
    )


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
