"""Runs the ablation: trains, evaluates, writes one result file per run; what is finished is not done again.

    python benchmarks/ablation/run.py --work /tmp/ablation                    # everything in settings.json
    python benchmarks/ablation/run.py --work /tmp/ablation --groups main      # one group
    python benchmarks/ablation/run.py --list                                  # what is finished, what is not

Every step is a command a user would type (`mgml convert`, `nnUNetv2_plan_and_preprocess`, `mgml plan`,
`nnUNetv2_train`, `mgml evaluate`). Runs use one thread each; ``--parallel`` many go side by side. A processor
without bfloat16 instructions computes in float32, which result and page say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import torch
from collect import Result
from data import call, folder_name, prepare
from machine import code_changed, commit
from precision import precision_on
from settings import STOCK_WIDTH, Run, all_runs, read_settings
from tqdm import tqdm

from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.scoring.info import provenance
from nnunetv2_mgml.scoring.results import Evaluation, load_evaluation
from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log

CONFIGURATION = "3d_fullres"


def main() -> int:
    """Run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("ablation_work"), help="folder for data and models")
    parser.add_argument("--groups", nargs="+", help="groups of settings.json (default: all)")
    parser.add_argument("--match", default="", help="only runs whose name (see --list) this regular expression finds")
    parser.add_argument("--parallel", type=int, default=max(1, (os.cpu_count() or 2)), help="runs side by side")
    parser.add_argument("--changed", action="store_true", help="train rows of changed designs again")
    parser.add_argument("--keep_models", action="store_true", help="keep checkpoints and predictions")
    parser.add_argument("--list", action="store_true", help="show what is finished and stop")
    args = parser.parse_args()
    settings = read_settings()
    runs = [run for run in all_runs(settings, args.groups) if re.search(args.match, run.name)]
    if args.list:
        for run in runs:
            print("done" if run.finished() and not (args.changed and of_old_design(run)) else "    ", run.name)
        return 0
    work = args.work.resolve()
    open_runs = [run for run in runs if not run.finished() or (args.changed and of_old_design(run))]
    for dataset in dict.fromkeys(run.dataset for run in open_runs):
        prepare(work, settings["datasets"][dataset])
    failed = 0
    with ThreadPoolExecutor(args.parallel) as pool, tqdm(total=len(runs), initial=len(runs) - len(open_runs)) as bar:
        tasks = {pool.submit(execute, run, work, args.keep_models): run for run in open_runs}
        for task in as_completed(tasks):
            bar.update()
            try:
                mean = task.result()["mean"]
                bar.write(f"{tasks[task].name}: mean Dice {100 * mean:.2f}")
            except Exception:  # the other runs go on; the exit code tells
                failed += 1
                bar.write(f"{tasks[task].name} FAILED\n{traceback.format_exc()}")
    return 1 if failed else 0


def of_old_design(run: Run) -> bool:
    """Return whether a finished run was trained before its design changed."""
    return run.file.is_file() and Result(run, json.loads(run.file.read_text())).of_old_design


def execute(run: Run, work: Path, keep_model: bool) -> dict[str, Any]:
    """Train and evaluate one run and write its result file."""
    started, described = time.time(), describe(run)  # before the run, since the code may change meanwhile
    log = work / "logs" / f"{run.name}.txt"
    log.unlink(missing_ok=True)
    model = train(run, work, log)
    trained = time.time()
    evaluation = evaluate(run, work, log, model)
    result = {
        **described,
        "hours": {"training": (trained - started) / 3600, "evaluation": (time.time() - trained) / 3600},
        **scores(evaluation),
        "validation": validation_scores(model, run.fold),
        "meta": last_epoch(model, run.fold),
    }
    write_json(run.file, result, indent=None)
    if not keep_model:
        shutil.rmtree(model)
    return result


def train(run: Run, work: Path, log: Path) -> Path:
    """Train a run by the commands a user would type; return the folder of the model."""
    options = {**run.options, "cpu_bfloat16": computes_in_bfloat16()}
    if STOCK_WIDTH in options:
        options["features_per_stage"] = options.pop(STOCK_WIDTH)
    data = run.dataset_settings
    plans = f"nnUNetMGMLPlans_{run.name.replace('+', '.')}"
    model = work / "results" / folder_name(data) / f"{run.trainer}__{plans}__{CONFIGURATION}"
    shutil.rmtree(model, ignore_errors=True)
    call(
        work,
        log,
        [
            "mgml",
            "plan",
            "-d",
            str(data["id"]),
            "--plans_name",
            plans,
            "--set",
            *(f"{key}={json.dumps(value)}" for key, value in options.items()),
        ],
    )
    skip = ["--skip_validation"] if data["kind"] == "real" else []
    call(
        work,
        log,
        [
            *skip,
            "nnUNetv2_train",
            str(data["id"]),
            CONFIGURATION,
            str(run.fold),
            "-tr",
            run.trainer,
            "-p",
            plans,
            "-device",
            "cpu",
        ],
    )
    return model


def computes_in_bfloat16() -> bool:
    """Return whether this processor has instructions for it."""
    return precision_on(torch.device("cpu")) == "bfloat16"


def evaluate(run: Run, work: Path, log: Path, model: Path) -> Evaluation:
    """Evaluate on the held-out cases (phantoms) or on the fold's validation cases (real), without mirroring."""
    data, output = run.dataset_settings, model / "evaluation"
    raw = work / "raw" / folder_name(data)
    source = (
        ["-d", str(data["id"])]
        if data["kind"] == "real"
        else ["-i", str(raw / "imagesTs"), "-l", str(raw / "labelsTs")]
    )
    subsets = ["--subsets", *run.subsets] if run.subsets else []
    call(
        work,
        log,
        [
            "mgml",
            "evaluate",
            "-m",
            str(model),
            "-f",
            str(run.fold),
            *source,
            "-o",
            str(output),
            "-device",
            "cpu",
            "--disable_tta",
            *(["--cpu_bfloat16"] if computes_in_bfloat16() else []),
            "--metrics",
            "dice",
            "-np",
            "0",
            "-npp",
            "0",
            "-nps",
            "0",
            "--disable_progress_bar",
            *subsets,
            "--remove_small",
            *(f"{region}={voxels}" for region, voxels in run.remove_small.items()),
        ],
    )
    return load_evaluation(output)


def describe(run: Run) -> dict[str, Any]:
    """Return what the run was, and on which code."""
    return {
        "group": run.group,
        "dataset": run.dataset,
        "design": run.design,
        "variant": run.variant,
        "seed": run.seed,
        "fold": run.fold,
        "trainer": run.trainer,
        "options": run.options,
        "dataset_settings": run.dataset_settings,
        "resolved": run.resolved,
        "precision": precision_on(torch.device("cpu")),
        "commit": commit(),
        "code_changed": code_changed(),
        "versions": provenance()["versions"],
    }


def scores(evaluation: Evaluation) -> dict[str, Any]:
    """Return mean Dice over subsets and regions, per region, and all single values in case order."""
    values = {region: evaluation.values("dice", region) for region in evaluation.region_names}
    return {
        "mean": sum(float(v.to_numpy().mean()) for v in values.values()) / len(values),
        "regions": {region: float(v.to_numpy().mean()) for region, v in values.items()},
        "cases": list(next(iter(values.values())).index),
        "dice": {
            region: {subset: [round(float(x), 4) for x in v[subset]] for subset in v} for region, v in values.items()
        },
    }


def validation_scores(model: Path, fold: int) -> dict[str, float] | None:
    """Return the trainer's own table over all subsets on the fold's validation cases: what tuning may look at."""
    folder = model / f"fold_{fold}" / "subset_validation"
    if not (folder / "results.csv").is_file():
        return None
    result = scores(load_evaluation(folder))
    return {"mean": result["mean"], **result["regions"]}


def last_epoch(model: Path, fold: int) -> dict[str, float]:
    """Return the last line of the training's own log: losses and meta-parameters."""
    return read_log(model / f"fold_{fold}" / LOG_NAME)[-1]


if __name__ == "__main__":
    sys.exit(main())
