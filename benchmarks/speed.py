"""Every ratio of speed and memory that has a goal, in one run. Writes benchmarks/results/speed.json and docs/speed.md.

    python benchmarks/speed.py --case BraTS2021_00006     # on an idle machine, a dozen minutes; the folder of a case
    python benchmarks/speed.py                            # with a phantom of the same size
    python benchmarks/speed.py --tiny --folder /tmp/speed # to see that it works
    python benchmarks/speed.py --page                     # the page anew from what is there

Things that are compared are timed in turns in this process; a ratio is the median of the turns' ratios, its scatter
how far nine of ten turns lie from it at most. Weights are random. For two slow cores: patches of 64^3, batch 1, five
stages; whole cases without mirroring, and as many turns of them as ``--minutes`` allows, at least one.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loader
import numpy as np
import speed_case
import torch
from cost_page import ratios, scatter
from gpu_sections import DESIGN, Settings, Size, in_turns, parts
from machine import processor, short_commit
from memory import peak_of_step
from speed_page import GOALS, write_page
from step import MODALITIES, predictions, random_batch

from nnunetv2_mgml.inference.compiled import CompiledNetworks
from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.upstream.allocator import freed_memory_kept

RESULTS = Path(__file__).parent / "results" / "speed.json"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
SIZE, TINY_SIZE = Size(64, 1, 5), Size(16, 1, 3)
CASE_SHAPE, TINY_SHAPE = (155, 240, 240), (16, 20, 16)
TERMS = ("plain", "mgml", "shipped")
SETTINGS = {
    "one": "float32",
    "bfloat16": "`--cpu_bfloat16`",
    "openvino": "`--backend openvino`, compiling included",
    "openvino_bfloat16": "`--backend openvino --cpu_bfloat16`, compiling included",
}
"""Ways to predict a whole case, of which the fastest is compared with stock nnU-Net."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, help="folder of a BraTS 2021 case; default: a phantom of its size")
    parser.add_argument("--minutes", type=float, default=11, help="no turn of whole cases begins that would end later")
    parser.add_argument("--turns", type=int, default=5, help="of what takes seconds")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--page", action="store_true", help="write the page from what was measured before")
    parser.add_argument("--folder", type=Path, help="write speed.json and speed.md there")
    args = parser.parse_args()
    results, page = (args.folder / "speed.json", args.folder / "speed.md") if args.folder else (RESULTS, PAGE)
    if not args.page:
        with tempfile.TemporaryDirectory() as work:
            results.parent.mkdir(parents=True, exist_ok=True)
            measure(args, Path(work), results)
    write_page(page, read_json(results) if results.is_file() else {})
    print(f"wrote {results} and {page}")


def measure(args: argparse.Namespace, work: Path, results: Path) -> None:
    """Measure everything and write ``results`` at the end; ``work`` is an empty folder.

    What is done so far lies beside them as ``*.partial.json``, where it stays if this is stopped.
    """
    partial = results.with_suffix(".partial.json")

    def say(part: str) -> None:
        write_json(partial, found)
        announce(part)

    until = time.monotonic() + 60 * args.minutes
    settings = Settings("cpu", args.tiny, 0, work, None, work)
    size = TINY_SIZE if args.tiny else SIZE
    turns = 2 if args.tiny else args.turns
    found: dict[str, Any] = {**about(args, size)}
    say("training steps")
    found.update(training(settings, size, turns))
    say("memory")
    found.update(memory(settings, size))
    say("patches")
    patches = patch_seconds(settings, size, turns)
    found["one_of_four_ratio"] = entry("one_of_four_ratio", patches, "one", "four")
    found["fifteen_subsets_ratio"] = entry("fifteen_subsets_ratio", patches, "fifteen", "four")
    bfloat16 = "bfloat16" in patches
    if bfloat16:
        found["bfloat16_patch_ratio"] = entry("bfloat16_patch_ratio", patches, "bfloat16", "four")
    if "openvino" in patches:
        fastest = (fastest_of(patches, *names) for names in (("openvino", "openvino_bfloat16"), ("four", "bfloat16")))
        found["openvino_patch_ratio"] = entry("openvino_patch_ratio", patches, *fastest)
        found["openvino_one_ratio"] = entry("openvino_one_ratio", patches, "openvino_one", "one")
    say("loaders")
    plans = speed_case.write_plans(size.plan())
    dataset = speed_case.write_preprocessed(work, plans, 2, size.patch + size.patch // 4)
    batches = loading(dataset, turns)
    found["loader_ratio"] = entry("loader_ratio", batches, "mgml", "nnunet")
    say("profile of a step")
    step = parts(settings, settings.steps(size))
    found["profile"] = {
        "training_step": {**stages(step), "loader": statistics.median(batches["mgml"])},
        "forward_passes": {
            name: statistics.median(step[name]) for name in ("encode", "fuse_decode", "decode_modalities")
        },
    }
    say("profile of a whole case")
    found["case"] = speed_case.write_case(work, args.case, TINY_SHAPE if args.tiny else CASE_SHAPE)
    models = {
        name: speed_case.write_model(work / name, trainer, plans, options)
        for name, trainer, options in (("ours", "nnUNetTrainerMGML", settings_of(args)), ("stock", "nnUNetTrainer", {}))
    }
    found["profile"]["prediction"] = speed_case.profile(
        speed_case.commands(work, models["ours"], models["stock"], False)["one"]
    )
    found["export_share"] = {
        **about_goal("export_share"),
        "value": 1 - found["profile"]["prediction"]["network"] / sum(found["profile"]["prediction"].values()),
        "scatter": None,
    }
    coarse = speed_case.write_model(
        work / "coarse", "nnUNetTrainerMGML", speed_case.write_plans(size.plan(), 2.0), settings_of(args)
    )
    found["profile"]["prediction_at_2_mm"] = speed_case.profile(
        speed_case.commands(work, coarse, models["stock"], False)["one"]
    )
    say("whole cases")
    cases = until_time(
        speed_case.commands(work, models["ours"], models["stock"], bfloat16), until, 1 if args.tiny else 3
    )
    found["fifteen_subsets_files_ratio"] = entry("fifteen_subsets_files_ratio", cases, "fifteen", "one")
    fastest = min(set(SETTINGS) & set(cases), key=lambda name: statistics.median(cases[name]))
    found["stock_prediction_ratio"] = entry("stock_prediction_ratio", cases, fastest, "stock")
    found["stock_prediction_ratio"]["setting"] = SETTINGS[fastest]
    found["whole_case_seconds"] = cases
    found["seconds_measured"] = round(time.monotonic() - until + 60 * args.minutes)
    write_json(results, found)
    partial.unlink()


def about(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Return machine, versions, commit, sizes."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": short_commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "tiny": args.tiny,
        "patch": size.patch,
        "batch": size.batch,
        "stages": size.stages,
        "design": DESIGN,
    }


def announce(what: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {what}", flush=True)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the plugin's options of a model folder."""
    return {"width_factor": 0.25} if args.tiny else {}


def about_goal(key: str) -> dict[str, Any]:
    """Return goal and explanation of a key."""
    goal = GOALS[key]
    return {"goal": goal.at_most, "how": goal.how}


def entry(key: str, seconds: Mapping[str, Sequence[float]], one: str, other: str) -> dict[str, Any]:
    """Return a ratio of times with its scatter, its goal, and the times."""
    turns = min(len(seconds[one]), len(seconds[other]))
    values = ratios({name: list(times[:turns]) for name, times in seconds.items()}, one, other)
    return {
        **about_goal(key),
        "value": statistics.median(values),
        "scatter": scatter(values) if turns > 1 else None,
        "seconds": {"of": list(seconds[one]), "beside": list(seconds[other])},
    }


def training(settings: Settings, size: Size, turns: int) -> dict[str, Any]:
    """Return the ratios of training steps; ours are a full one and those between, as many as the training has."""
    steps = {terms: settings.steps(size, terms=terms) for terms in TERMS}
    steps["full"] = settings.steps(size, modality_decoder_scale=0)
    steps["half"] = settings.steps(size, teacher_scale=1)
    between = {f"{name} between": functools.partial(step, False) for name, step in steps.items()}
    every = steps["shipped"].learner.objective.complete_every
    seconds = in_turns(settings, {**steps, **between, "stock": settings.stock(size)}, turns)
    for name in steps:
        pairs_of_turns = zip(seconds[name], seconds[f"{name} between"], strict=True)
        seconds[name] = [(full + (every - 1) * short) / every for full, short in pairs_of_turns]
    pairs = {"mgml": ("mgml", "plain"), "default": ("shipped", "plain"), "stock": ("shipped", "stock")}
    pairs |= {"half_decoder": ("shipped", "full"), "half_teacher": ("half", "plain")}
    return {f"{key}_step_time_ratio": entry(f"{key}_step_time_ratio", seconds, *pair) for key, pair in pairs.items()}


def memory(settings: Settings, size: Size) -> dict[str, Any]:
    """Return the ratios of peak memory, counted by PyTorch's allocator, so without scatter."""
    peaks = {terms: peak_of_step(settings.steps(size, terms=terms)) for terms in ("plain", "shipped")}
    peaks["stock"] = peak_of_step(settings.stock(size))
    return {
        key: {
            **about_goal(key),
            "value": peaks["shipped"] / peaks[other],
            "scatter": 0.0,
            "mebibytes": {"of": peaks["shipped"] / 2**20, "beside": peaks[other] / 2**20},
        }
        for key, other in (("default_step_memory_ratio", "plain"), ("stock_step_memory_ratio", "stock"))
    }


def patch_seconds(settings: Settings, size: Size, turns: int) -> dict[str, list[float]]:
    """Return seconds of a patch: from four modalities, one, for 15 subsets; in bfloat16 where the CPU has it."""
    learner = settings.learner(size)
    x = random_batch(size.plan(), 1).x
    functions: dict[str, Callable[[], Any]] = dict(predictions(learner, x, all_subsets(MODALITIES)))
    del functions["separately"]
    four = functions["four"]

    def in_bfloat16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            four()

    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else a patch takes minutes
        functions["bfloat16"] = in_bfloat16
    functions.update(by_openvino(learner.network.eval(), x, "bfloat16" in functions))
    with torch.inference_mode(), freed_memory_kept():  # as the predictor does
        return in_turns(settings, functions, turns)


def by_openvino(network: torch.nn.Module, x: torch.Tensor, bfloat16: bool) -> dict[str, Callable[[], Any]]:
    """Return the predictions of a patch by OpenVINO from four modalities and from one; nothing without the library."""
    if find_spec("openvino") is None:
        return {}
    four, one = (True,) * MODALITIES, (True, *(False,) * (MODALITIES - 1))
    networks = CompiledNetworks()
    made = {"openvino": networks.of(network, four, x), "openvino_one": networks.of(network, one, x)}
    if bfloat16:
        made["openvino_bfloat16"] = CompiledNetworks(bfloat16=True).of(network, four, x)
    return {name: functools.partial(run, x) for name, run in made.items()}


def fastest_of(seconds: Mapping[str, Sequence[float]], *names: str) -> str:
    """Return which of those that were timed took least."""
    return min((name for name in names if name in seconds), key=lambda name: statistics.median(seconds[name]))


def loading(dataset: Path, turns: int) -> dict[str, list[float]]:
    """Return CPU seconds of batches of nnU-Net's loader and of ours, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return loader.measure(dataset, "nnUNetPlans", "3d_fullres", 5 * turns)
    finally:
        torch.set_num_threads(threads)


def stages(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the seconds of network, loss, backward pass and optimiser from those of the stages up to each."""
    until = [statistics.median(seconds[name]) for name in ("network", "forward_and_loss", "with_backward", "step")]
    names = ("network", "loss", "backward", "optimiser")
    return dict(zip(names, (max(0.0, float(value)) for value in np.diff([0.0, *until])), strict=True))


def until_time(functions: Mapping[str, Callable[[], Any]], until: float, most: int) -> dict[str, list[float]]:
    """Return seconds of functions in turns.

    Args:
        functions: by name.
        until: `time.monotonic` at which all is to be over; a function that would take longer is left out of a turn.
        most: turns; in the first one every function runs.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(most):
        for name, function in functions.items():
            start = time.perf_counter()
            if len(times[name]) < turn or (turn and time.monotonic() + times[name][-1] > until):
                continue
            function()
            times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
