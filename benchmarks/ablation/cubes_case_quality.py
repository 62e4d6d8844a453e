"""Does the estimate of a prediction's own Dice beat the mean of its subset? On cubes of real patients.

One model is trained on the training patients, the estimate is fitted on the validation patients as `mgml evaluate
--write_subset_report` fits it, and judged once on the test patients, all 15 subsets.

    MGML_REAL_DATA=... python benchmarks/ablation/cubes_case_quality.py --work /tmp/case_quality
    python benchmarks/ablation/cubes_case_quality.py --page      # docs/case-quality.md and its figure from the result
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cubes_data import Cubes, cubes_file, read_cubes, split
from cubes_training import Training
from cubes_variants import Run
from step import autocast


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
    torch.save(training.learner.network.state_dict(), work / "network.pt")
    for part in ("validation", "test"):
        np.save(work / f"logits_{part}.npy", logits(training, cubes, parts[part]))
    print("done", flush=True)


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


def main() -> None:
    """Train, fit, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("case_quality_work"))
    parser.add_argument("--variant", default="mgml:patch=16")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=25)
    args = parser.parse_args()
    train(args.work, args.variant, args.steps, args.minutes)


if __name__ == "__main__":
    main()
