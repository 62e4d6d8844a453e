"""Does the estimate of a prediction's own Dice beat the mean of its subset? On cubes of real patients.

One model is trained on the training patients, the estimate is fitted on the validation patients as `mgml evaluate
--write_subset_report` fits it, and judged once on the test patients, all 15 subsets.

    MGML_REAL_DATA=... python benchmarks/ablation/cubes_case_quality.py --work /tmp/case_quality
    python benchmarks/ablation/cubes_case_quality.py --page      # docs/case-quality.md and its figure from the result
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from case_quality_page import page, scatter
from cubes_data import REGIONS, Cubes, cubes_file, read_cubes, split
from cubes_scores import dice_of, to_regions
from cubes_training import Training
from cubes_variants import CHANNELS, Run
from cubes_work import code, device_name
from machine import processor
from step import autocast

from nnunetv2_mgml.inference.case_quality import SIGNS, estimate, signs_of, summary
from nnunetv2_mgml.io.files import read_json, replacing, write_json
from nnunetv2_mgml.modalities import Subset, all_subsets, subset_name
from nnunetv2_mgml.presentation.figures.style import save
from nnunetv2_mgml.scoring.case_quality import fit_region, moved_dice, rank_correlation

FOLDER = Path(__file__).parents[1]
RESULT = FOLDER / "results" / "case_quality.json"
PAGE = FOLDER.parent / "docs" / "case-quality.md"
FIGURE = PAGE.parent / "images" / "case_quality.png"


def train(work: Path, variant: str, steps: int, minutes: float) -> None:
    """Train and keep logits of all subsets of the validation and test patients in ``work/logits_PART.npy``.

    Args:
        work: folder.
        variant: see `cubes_variants`.
        steps: at most so many.
        minutes: the steps are cut so that they fit.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cubes = read_cubes(cubes_file())
    parts = split(cubes.patients)
    training = Training(Run(variant, 0, steps), cubes, parts["train"])
    start = time.time()
    training.advance(20)
    training.set_steps(min(steps, int(20 * minutes * 60 / (time.time() - start))))
    print(f"{training.steps} steps", flush=True)
    while training.done < training.steps:
        training.advance(min(50, training.steps - training.done))
        print(f"{training.done}: {training.recent_loss(50):.4f}, {(time.time() - start) / 60:.1f} min", flush=True)
    about = {"steps": training.steps, "seed": 0, "seconds": round(time.time() - start), "precision": training.precision}
    for part in ("validation", "test"):
        with replacing(work / f"logits_{part}.npy") as path, path.open("wb") as file:
            np.save(file, logits(training, cubes, parts[part]))
    about.update(variant=variant, asked_for=steps, device=device_name(training.device), processor=processor())
    write_json(work / "training.json", {**about, **code(None)})  # last: says that the rest is whole


def trained(work: Path, variant: str, steps: int) -> bool:
    """Return whether a folder holds the logits of this training."""
    file = work / "training.json"
    about = read_json(file) if file.is_file() else {}
    return (about.get("variant"), about.get("asked_for")) == (variant, steps)


@torch.inference_mode()
def logits(training: Training, cubes: Cubes, cases: list[int]) -> np.ndarray:
    """Return logits ``(N, S, R, x, y, z)`` float16 of whole cubes for all subsets."""
    network = training.learner.network.eval()
    network.decoder.deep_supervision = False
    table = torch.tensor(training.run.subsets)
    found = []
    for chosen in torch.tensor(cases).split(4):
        with autocast(cubes.images.device, training.precision):
            found.append(training.learner.predict(cubes.images[chosen], table).half().numpy())
    return np.concatenate(found)


def look(work: Path, part: str, cubes: Cubes, cases: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return Dice ``(N, S, R)`` and signs ``(N, S, R, 2)`` (`signs_of`) of stored logits."""
    stored = np.load(work / f"logits_{part}.npy", mmap_mode="r")
    dice = np.empty(stored.shape[:3])
    signs = np.empty((*stored.shape[:3], len(SIGNS)))
    for number, case in enumerate(cases):
        values = torch.from_numpy(stored[number].astype(np.float32))
        masks, p = to_regions(values), values.sigmoid()
        dice[number] = dice_of(masks, cubes.regions[case]).numpy()
        sums = [t.flatten(-3).sum(-1).double().numpy() for t in (masks.float(), p * masks, p)]
        for place in np.ndindex(dice.shape[1:]):
            signs[(number, *place)] = signs_of(summary(*(float(values[place]) for values in sums)))
    return dice, signs


def agreement(work: Path, part: str) -> np.ndarray:
    """Return how far stored predictions agree with those from one of their modalities less, ``(N, S, R)``.

    The log-odds of the mean Dice between the masks; 0 for single modalities.
    """
    stored = np.load(work / f"logits_{part}.npy", mmap_mode="r")
    subsets = list(all_subsets(len(CHANNELS)))
    fewer = [
        [column for column, other in enumerate(subsets) if sum(other) == sum(one) - 1 and covers(one, other)]
        for one in subsets
    ]
    found = np.zeros(stored.shape[:3])
    for number in range(len(stored)):
        masks = to_regions(torch.from_numpy(stored[number].astype(np.float32)))
        for column, others in enumerate(fewer):
            if others:
                mean = dice_of(masks[others], masks[column]).mean(0).double().clamp(1e-3, 1 - 1e-3)
                found[number, column] = torch.logit(mean).numpy()
    return found


def covers(one: Subset, other: Subset) -> bool:
    """Return whether a subset has all modalities of another."""
    return all(a or not b for a, b in zip(one, other, strict=True))


def with_agreement(
    names: Sequence[str], validation: Sequence[np.ndarray], test: Sequence[np.ndarray]
) -> dict[str, float]:
    """Return the errors of the estimate of a region that also has `agreement` among its signs.

    Args:
        names: of the ``S`` subsets.
        validation: Dice ``(N, S)``, signs ``(N, S, 2)`` and agreement ``(N, S)`` of the patients it is fitted on.
        test: the same of those it is judged on.
    """
    (dice, *known), (truth, *new) = validation, test
    fitted = fit_region(dice, np.concatenate([known[0], known[1][..., None]], -1), names)
    signs = np.concatenate([new[0], new[1][..., None]], -1)
    moved = np.array([[moved_dice(fitted, name, line[s]) for s, name in enumerate(names)] for line in signs])
    return {
        "validation_left_out": fitted["left_out"]["mean_absolute_error"],
        "test": float(np.abs(np.clip(moved, *fitted["dice_range"]) - truth).mean()),
    }


def judge(
    dice: np.ndarray, estimated: np.ndarray, mean: np.ndarray, bound: float, rival_bound: float
) -> dict[str, Any]:
    """Return how estimate and subset's mean do on held-out predictions.

    Args:
        dice: ``(N, S)``.
        estimated: ``(N, S)``.
        mean: ``(S,)``, of the validation patients.
        bound: below which an estimate is doubtful; chosen on validation patients, as ``rival_bound`` for the mean.
        rival_bound: see there.
    """
    rival = np.broadcast_to(mean, dice.shape)
    bad = dice < 0.5

    def told(values: np.ndarray, threshold: float, rows: Any = slice(None)) -> dict[str, Any]:
        v, d, b = values[rows], dice[rows], bad[rows]
        exact = np.quantile(v[~b], 0.05) if (~b).any() else np.nan
        return {
            "mean_absolute_error": float(np.abs(v - d).mean()),
            "rank_correlation": rank_correlation(v.ravel(), d.ravel()),
            "calibration_error": calibration_error(v.ravel(), d.ravel()),
            "bad_found": float((v[b] < threshold).mean()),
            "false_alarms": float((v[~b] < threshold).mean()),
            "bad_found_at_5_percent": float((v[b] < exact).mean()),
        }

    draws = np.random.default_rng(0).integers(len(dice), size=(2000, len(dice)))
    differences = [np.abs(estimated[d] - dice[d]).mean() - np.abs(rival[d] - dice[d]).mean() for d in draws]
    within = [rank_correlation(estimated[:, s], dice[:, s]) for s in range(dice.shape[1])]
    return {
        "bad": float(bad.mean()),
        "estimate": told(estimated, bound),
        "subset_mean": told(rival, rival_bound),
        "difference_of_errors": [float(v) for v in np.quantile(differences, [0.025, 0.975])],
        "correlation_within_subset": float(np.mean([value for value in within if value is not None])),
    }


def calibration_error(values: np.ndarray, dice: np.ndarray, bins: int = 10) -> float:
    """Return the mean distance between mean estimate and mean Dice of ten parts of equal size, by estimate."""
    order = np.argsort(values, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(len(p) * abs(values[p].mean() - dice[p].mean()) for p in parts) / len(values))


def result(work: Path, variant: str) -> dict[str, Any]:
    """Fit on the validation patients, judge on the test patients."""
    cubes = read_cubes(cubes_file())
    parts = split(cubes.patients)
    subsets = list(all_subsets(len(CHANNELS)))
    names = [subset_name(subset, CHANNELS) for subset in subsets]
    dice, signs = look(work, "validation", cubes, parts["validation"])
    test_dice, test_signs = look(work, "test", cubes, parts["test"])
    agreed, test_agreed = agreement(work, "validation"), agreement(work, "test")
    regions, points = {}, {}
    for row, region in enumerate(REGIONS):
        fitted = fit_region(dice[..., row], signs[..., row, :], names)
        mean = dice[..., row].mean(0)
        good = dice[..., row] >= 0.5
        rival_bound = float(np.quantile(np.broadcast_to(mean, good.shape)[good], 0.05))
        truth = test_dice[..., row]
        found = [
            [
                estimate(fitted, name, dict(zip(SIGNS, 1 / (1 + np.exp(-test_signs[n, s, row])), strict=True)))
                for s, name in enumerate(names)
            ]
            for n in range(len(truth))
        ]
        value, low, high = (np.array([[e[k] for e in line] for line in found]) for k in ("estimate", "low", "high"))
        inside = (truth >= low) & (truth <= high)
        regions[region] = {
            "used": fitted["used"],
            "weights": fitted["weights"],
            "validation_left_out": fitted["left_out"],
            "with_agreement_of_modalities": with_agreement(
                names,
                (dice[..., row], signs[..., row, :], agreed[..., row]),
                (truth, test_signs[..., row, :], test_agreed[..., row]),
            ),
            "test": {
                **judge(truth, value, mean, fitted["doubtful_below"], rival_bound),
                "inside_interval": float(inside.mean()),
                "width_of_interval": float((high - low).mean()),
            },
            "subsets": {
                name: {
                    "dice": float(truth[:, s].mean()),
                    "bad": int((truth[:, s] < 0.5).sum()),
                    "rank_correlation": rank_correlation(value[:, s], truth[:, s]),
                    "error": float(np.abs(value[:, s] - truth[:, s]).mean()),
                    "error_of_subset_mean": float(np.abs(mean[s] - truth[:, s]).mean()),
                    "inside_interval": float(inside[:, s].mean()),
                }
                for s, name in enumerate(names)
            },
        }
        points[region] = {
            "estimate": np.round(value, 3).tolist(),
            "dice": np.round(truth, 3).tolist(),
            "subset_mean": np.round(mean, 3).tolist(),
        }
    return {
        "variant": variant,
        "patients": {part: len(cases) for part, cases in parts.items()},
        "subsets": names,
        "regions": regions,
        "test_predictions": points,
        "training": json.loads((work / "training.json").read_text()),
    }


def main() -> None:
    """Train, fit, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("case_quality_work"), help="a training there is not repeated")
    parser.add_argument("--variant", default="mgml:patch=16,modality_decoder_scale=0")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--page", action="store_true", help="only write the page and the figure")
    args = parser.parse_args()
    if not args.page:
        if not trained(args.work, args.variant, args.steps):
            train(args.work, args.variant, args.steps, args.minutes)
        write_json(RESULT, result(args.work, args.variant), indent=None)
    content = json.loads(RESULT.read_text())
    save(scatter(content), FIGURE)
    PAGE.write_text(page(content))


if __name__ == "__main__":
    main()
