"""Writes docs/speed.md from what `speed.py` measured, each figure beside its goal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpu_page import table

from nnunetv2_mgml.io.files import write_text


class Goal(NamedTuple):
    """What a key of speed.json says."""

    at_most: float | None
    """The goal; None where there is none."""
    what: str
    how: str


GOALS = {
    "mgml_step_time_ratio": Goal(
        1.08,
        "a step with Meta-AMF and L_CR / without",
        "training steps in float32, in turns, after one untimed turn; of ours one full step and three between",
    ),
    "default_step_time_ratio": Goal(1.20, "the default's step / without our terms", "as above"),
    "default_step_memory_ratio": Goal(
        1.15,
        "its peak memory",
        "all that lives at the peak of a step (weights, momentum, batch included), by PyTorch's CPU allocator: "
        "the same every time",
    ),
    "stock_step_time_ratio": Goal(
        1.00,
        "the default's step / stock nnU-Net's",
        "nnU-Net's network at the plan's widths, ours at our default `width_factor`; its own loss and optimiser",
    ),
    "stock_step_memory_ratio": Goal(1.10, "its peak memory / stock nnU-Net's", "as above"),
    "half_decoder_step_time_ratio": Goal(
        None,
        "the default's step / with `modality_decoder_scale=0`",
        "where the decoder shared by all modalities ends: at half the resolution / at the full one, as published",
    ),
    "half_teacher_step_time_ratio": Goal(
        None,
        "a step with `teacher_scale=1` / without our terms",
        "where the prediction from all modalities, and what is learned from it, ends at half the resolution",
    ),
    "one_of_four_ratio": Goal(
        0.40, "a patch from one modality / from four", "network alone, float32, in turns, as the predictor runs it"
    ),
    "fifteen_subsets_ratio": Goal(3.0, "a patch for 15 subsets / for one", "network alone, as `mgml evaluate` does it"),
    "fifteen_subsets_files_ratio": Goal(
        3.5,
        "15 subsets / one, files to files",
        "`mgml evaluate` (Dice included) / `mgml predict`, both loading the model, no worker processes",
    ),
    "stock_prediction_ratio": Goal(
        0.35,
        "a whole case by our fastest setting / by stock nnU-Net",
        "`mgml predict` / nnU-Net's own predictor on the same plan, all modalities there, files to files, one process",
    ),
    "export_share": Goal(
        0.15,
        "share of a whole case that is not the network",
        "one profiled `mgml predict` in float32, everything from loading the model to the written label map",
    ),
    "loader_ratio": Goal(1.02, "a batch of our loader / of nnU-Net's", "CPU time of one thread, the same patches"),
    "openvino_patch_ratio": Goal(
        0.77,
        "a patch by `--backend openvino` / by PyTorch",
        "network alone, four modalities, of either the faster of float32 and bfloat16; goal: 1.3 times as fast",
    ),
    "openvino_one_ratio": Goal(None, "the same, from one modality", "compiled for it, float32 / float32"),
    "bfloat16_patch_ratio": Goal(None, "a patch in bfloat16 / in float32", "network alone; pays where the CPU has it"),
}
"""By the keys of speed.json, in the order of the page."""
_HEAD = """# Speed

Made by `python benchmarks/speed.py` ({seconds} s) on {processor}, {cores} cores, {threads} thread(s), load in the
minute before it {load}, torch {torch}, commit {commit}, {date}. Patches of {patch}^3, batch {batch}, {stages} stages,
`{design}`, default options, random weights: small, so that two slow cores measure everything in one run;
[costs.md](costs.md) has every design on the paper's plan, [gpu.md](gpu.md) a GPU. A ratio is the median of the ratios
of turns in one process; *scatter*: nine of ten turns lie that close to it. Where the goal does too, the run does not
decide. Whole case: {case}, without mirroring, {turns} turn(s).
"""


_TRIED = """## What was tried

One AMD EPYC without AVX-512, one thread, by CPU time; 16 to 16 channels at 64^3 unless said otherwise. *AMX*: an Intel
Xeon with bfloat16 instructions, two threads; *AVX-512*: an AMD EPYC with it and bfloat16 instructions, two threads.
Times of single layers and functions, and of old and new code in turns, are of scripts that were not kept. Ratios and
seconds of whole steps are of the code of then, most with an encoder per modality and full steps only; today's are in
the tables on top.

- Kept: PyTorch leaves one small sample to a kernel of its own, which oneDNN's replaces (`upstream/cpu_layers.py`): 16
  to 16 channels at 32^3 took 111 ms forward and 226 backward, now 10 and 33; 64 to 64 at 16^3 47 and 86, now 14 and 55.
- Kept: the gradient of the weights from channels-last copies, 167 ms with the copies instead of 375.
- Kept: instance norms as group norms of one channel, 8 channels at 64^3 6.4 ms forward and 5.9 backward, now 2.3 and
  3.5.
- Kept: predictions channels last from layer to layer: 16 to 16 channels 101 ms, now 46; 8 to 8 29, now 14. A copy
  before each layer costs what that gains, and PyTorch's backward pass of the norm takes 52 ms in that layout instead
  of 9, so a training step stays as it is.
- Kept: the encoders and the complete view's decoder computed twice (`gradient_checkpointing`): 1038 MiB at the peak of
  a step, now 569. The complete view is computed first, so that its backward pass comes last, when the graphs of the
  others are gone; else nothing is gained there.
- Kept: 15 subsets at the finest scale one by one: 2.52 s two by two, 2.04 s one by one.
- Kept (AMX): predictions in bfloat16 channels last as well, where a convolution takes 4.5 ms instead of 12.7 (one
  thread); with norms of few voxels on a plain copy (128 channels at 8^3 1.7 ms, with the copies 0.1) and the skip
  fusion's product below a whole case took 19.1 s instead of 26.5, the norms still being PyTorch's.
- Kept (AMX): norms of predictions by PyTorch's batch norm over pieces of 2048 rows of 256 columns, joined in float64.
  PyTorch's group norm of what lies channels last is inexact: 16 channels at 64^3 1.5 ms and off by 0.02 where the means
  are up to 30 deviations from 0; by sums of our own over pieces 5.6 ms, on a copy 6.4, now 2.5, all within 5e-6. In
  bfloat16 1.3 ms, by sums of our own 8.0, now 2.1. A patch took 0.42 s (bfloat16 0.32), now 0.36 (0.21).
- Kept (AMX): such a norm writes over the convolution before it, and freed memory stays with the process while a case is
  predicted (`upstream/allocator.py`): two cases from patches of 128^3 69.0 s, with the memory kept 54.7, with both
  51.0; in bfloat16 38.7, 34.9, 32.8. At the peak 2.5 GB, now 2.9. The system hands out memory page by page: a norm of
  16 channels at 96^3 took 29 ms, with the memory kept 15.
- Kept (AMX): what lies channels last has the strides that oneDNN looks for, also of the axis of one sample; the skip
  fusion's convolutions went through copies before.
- Kept (AMX): what the skip fusion multiplies first stays channels last; PyTorch's batched product copied it in bfloat16
  (9.7 ms, now 0.8).
- Kept (AVX-512): a prediction's convolution to 8 channels, which fill half of a register, makes two neighbours at once,
  with a kernel of four taps for three: 16 to 8 channels 16.2 ms, now 12.0, 8 to 8 8.2, now 5.8; in bfloat16 8.2 and
  4.4, now 5.7 and 3.0. To 16 channels it takes longer (22.0 for 16.2).
- Kept (AVX-512): what the modalities add to a skip stays channels last when subsets share it, and the regions' weights
  go into the convolution behind them, so that no feature per class is written. With the convolutions above a patch took
  0.292 s, now 0.278, from one modality 0.127, now 0.116, for 15 subsets 1.25, now 1.11; in bfloat16 0.179, now 0.174,
  for 15 subsets no less (0.78, now 0.79).
- Kept (AVX-512): at the fine scales a prediction's transposed convolution and the convolution behind it are one
  (`upstream/raised_convolution.py`), eight outputs per coarse voxel from 2^3 of its neighbours. 16 and 8 to 8 channels
  at 64^3 13.4 ms with the stack between them, now 10.3; 64 and 32 to 32 143, now 112. In turns a patch took 0.283 s,
  now 0.278, from one modality 0.119, now 0.114, for 15 subsets 1.11, now 1.05. In bfloat16 two rounded parts would be
  added, whose error is 1.2 times the layers'; they stay there.
- Kept (AVX-512): a norm writes the pieces that it summed, so that a thread finds what it has just read, and takes
  pieces from 32 channels at 16^3 on. 8 channels at 64^3 took 1.5 or 0.7 ms, by process, now 0.7 in either; 32 at 16^3
  0.28, now 0.13. After the run above: its figures do not have it.
- Kept (AVX-512): `imfuse` scans only what is present, subsets of as many modalities together: from one modality 0.199
  s, now 0.137, for 15 subsets 2.69, now 1.92, which is 5.3 times a patch (7.2).
- Kept (AVX-512): in training in bfloat16 the gradients of a convolution to at most 8 channels come from copies with the
  channels side by side, and norms are group norms. 8 to 8 channels, two samples of 24^3, one thread: 6.8 ms backward,
  now 2.3 (16 to 8: 6.1, now 3.9; to 16 channels no gain); the norm forward and backward 0.31 ms, now 0.21. A step of
  the networks of the cubes ([results.md](results.md)), in turns with the stock network's 71 and 73 ms, took 148 ms
  without our terms and 206 by default before both, and in the run with both 123 and 170. In float32 such copies spared
  2 % of the default's step and nothing without our terms: not kept there.
- What is left of 15 subsets (AVX-512): before these two 0.21 s for the encoders and 0.52 s for the decoder's
  convolutions alone, which was 2.6 times a patch; 3.0 would take a network whose fusion and decoder are narrower yet.
  Of the other designs `m2ftrans`, `mmformer` and `concat` take 3.5, 3.4 and 3.3 times a patch.
- Kept: the decoder shared by all modalities at half the resolution, with its losses there (the row above). No
  prediction uses it. What it does to Dice: [results.md](results.md). `modality_decoder_scale=0` is as published. Our
  terms take the seconds they took, beside a step without them that is a fifth shorter: so 1.25 of it in one run
  and 1.28 in the next, not 1.19.
- An option that is off: `teacher_scale=1`, the prediction from all modalities at half the resolution, with its losses
  there (the row above); at its peak a step has 1.01 of the memory of one without our terms, not 1.09. What it does to
  Dice: [results.md](results.md#what-was-tried).
- Kept (AVX-512): the student and the complete view are one batch at the scales below full resolution that have at
  most 2^14 voxels in a batch. In turns a step of the default took 1.93 s, now 1.88, and one of the cubes' networks in
  bfloat16 on one thread 167 ms, now 151 (without our terms 122). From the next scale on a batch spares a little more
  and takes memory: at the peak 1.33 of that of a step without our terms. A design whose dropout acts where one pass has
  to be silent (`mmformer` at the bottleneck, `m2ftrans`, `sfusion`) or which draws (`demoseg`, `uhved`), and plans with
  dropout or batch norm, keep the passes apart; so does `imfuse`, whose scans would keep an eighth more memory at 128^3.
- Not built: what the modalities add to a skip once for both. The skips' part of one view is 82 ms of a step of 1.9 s.
- Not built: the teacher's pass only for samples whose target differs from the student's. With every subset alike one
  of 15 samples sees all it has, so a fifteenth of that pass would be spared: with its loss it is a tenth of a step, so
  less than one hundredth, for shapes that depend on data.
- Left to the plans: nnU-Net's resampling by PyTorch. Three logits from 78x120x120 to 155x240x240 voxels by the default
  0.89 s, by `resample_torch_fornnunet` 0.10, with differences of up to 2e-5 and another label in 7e-8 of the voxels.
  nnU-Net's planners whose names end in `_torchres` ask for it, and our models follow their plans.
- Not kept, since slower or no faster: the gradient of the weights as 27 (258 ms) or 9 (223 ms) matrix products over
  shifted views; channels last for strided convolutions' gradients.
- Not kept (AMX): the allocator's limits for a training. They spare 7 to 19 % of a step at 64^3 and 96^3, stock nnU-Net
  as much as ours, but memory rose from 6.4 to 8.7 GB (four trainings in one process), and it is for hours.
"""


def write_page(file: Path, result: Mapping[str, Any]) -> None:
    """Write the page for the content of speed.json."""
    write_text(file, page(result))


def page(result: Mapping[str, Any]) -> str:
    """Return the page; for an empty result the goals alone."""
    columns = ["what", "measured", "scatter", "goal: at most", "met", "how"]
    ratios = table(columns, (_row(goal, result.get(key), bool(result)) for key, goal in GOALS.items()))
    if not result:
        return f"# Speed\n\n**Not measured yet**: `python benchmarks/speed.py` on an idle machine.\n\n{ratios}"
    whole = "stock_prediction_ratio" in result
    head = _HEAD.format(
        seconds=result.get("seconds_measured", "stopped before its end; so far less than 600"),
        load=result["load_before"],
        date=result["date"][:10],
        turns=len(result["stock_prediction_ratio"]["seconds"]["of"]) if whole else 0,
        **{
            key: result.get(key, "not measured")
            for key in (
                *("processor", "cores", "threads", "torch", "commit", "patch", "batch", "stages", "design", "case"),
            )
        },
    )
    tiny = ["**Tiny sizes, to see that it works: not a measurement.**\n"] if result["tiny"] else []
    profile = result.get("profile", {})
    return "\n".join(
        [
            head,
            *tiny,
            ratios,
            _coarse(profile),
            f"{_whole_cases(result) if whole else ''}Keys of `benchmarks/results/speed.json` "
            "are those of the rows: " + ", ".join(f"`{key}`" for key in GOALS) + ".\n",
            "## Where the time of a training step goes",
            "",
            "Seconds of a full step of the default, one of four; the ratios above are of the mean of one such and "
            "three between. Each stage is the difference of two that end one stage apart; meanwhile worker processes "
            "make the next batch.",
            "",
            *(_step(profile) if "training_step" in profile else ["Not measured.\n"]),
            *(_whole_prediction(profile) if whole else ["Whole cases were not measured.\n"]),
            _TRIED,
        ]
    )


def _coarse(profile: Mapping[str, Any]) -> str:
    """Return what the share outside the network is where images and logits have to be resampled."""
    seconds = profile.get("prediction_at_2_mm")
    if not seconds:
        return ""
    share = 1 - seconds["network"] / sum(seconds.values())
    return (
        f"The share that is not the network is of a plan for 1 mm, the case's own spacing. With a plan for 2 mm, whose "
        f"network has an eighth of the work, it is {share:.2f}, resampling first: [below]"
        "(#where-the-time-of-a-whole-prediction-goes).\n"
    )


def _step(profile: Mapping[str, Any]) -> list[str]:
    seconds = profile["training_step"]
    return [
        _shares(seconds, ("network", "loss", "backward", "optimiser"), seconds),
        "Forward passes alone: " + _listed(profile["forward_passes"]) + ".\n",
    ]


def _whole_cases(result: Mapping[str, Any]) -> str:
    return (
        f"`stock_prediction_ratio` is of {result['stock_prediction_ratio']['setting']}; in seconds "
        f"{_seconds(result['stock_prediction_ratio'])}{_in_float32(result)}. 15 subsets / one: "
        f"{_seconds(result['fifteen_subsets_files_ratio'])}. "
    )


def _whole_prediction(profile: Mapping[str, Any]) -> list[str]:
    return [
        "## Where the time of a whole prediction goes",
        "",
        "Seconds of `mgml predict`, all modalities, from files to a label map, every part without those inside it; "
        "*at 2 mm*: the same case with a plan for 2 mm, so that images and logits are resampled.",
        "",
        _prediction(profile["prediction"], profile["prediction_at_2_mm"]),
    ]


def _row(goal: Goal, entry: Mapping[str, Any] | None, measured: bool) -> list[str]:
    at_most = "-" if goal.at_most is None else f"{goal.at_most:.2f}"
    if entry is None:
        why = "stopped before, or no library or instructions of this processor for it" if measured else goal.how
        return [goal.what, "not measured", "-", at_most, "-", why]
    met = "-" if goal.at_most is None else "yes" if entry["value"] <= goal.at_most else "**no**"
    once = len(entry["seconds"]["of"]) < 2 if "seconds" in entry else False
    spread = "-" if entry["scatter"] is None or once else f"{entry['scatter']:.0%}"
    if goal.at_most is not None and spread != "-" and abs(entry["value"] / goal.at_most - 1) < entry["scatter"]:
        met += ", within scatter"
    return [goal.what, f"{entry['value']:.2f}", spread, at_most, met, goal.how]


def _in_float32(result: Mapping[str, Any]) -> str:
    """Return what the ratio is where ours computes in float32 too, as stock nnU-Net does on a CPU."""
    ours = statistics.median(result["fifteen_subsets_files_ratio"]["seconds"]["beside"])
    stock = statistics.median(result["stock_prediction_ratio"]["seconds"]["beside"])
    return f", stock nnU-Net in float32; ours in float32 as well: {ours:.1f} s, {ours / stock:.2f} of it"


def _seconds(entry: Mapping[str, Any]) -> str:
    return " / ".join(", ".join(f"{value:.1f}" for value in entry["seconds"][side]) for side in ("of", "beside"))


def _shares(seconds: Mapping[str, float], counted: tuple[str, ...], shown: Mapping[str, float]) -> str:
    whole = sum(seconds[name] for name in counted)
    rows = ([name, *_told(value, whole, name in counted)] for name, value in shown.items())
    return table(["part", "seconds", "of the step"], rows)


def _told(seconds: float, whole: float, counted: bool) -> list[str]:
    """Return seconds and share; a difference of two times that noise has made zero is neither."""
    if seconds <= 0:
        return ["below the scatter", "-"]
    return [f"{seconds:.3f}", f"{seconds / whole:.0%}" if counted else f"({seconds / whole:.0%})"]


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"`{name}` {value:.3f}" for name, value in seconds.items())


def _prediction(fine: Mapping[str, float], coarse: Mapping[str, float]) -> str:
    def cells(seconds: Mapping[str, float], name: str) -> list[str]:
        return [f"{seconds[name]:.2f}", f"{seconds[name] / sum(seconds.values()):.0%}"]

    rows = ([name, *cells(fine, name), *cells(coarse, name)] for name in fine)
    return table(["part", "seconds", "share", "at 2 mm", "share"], rows)
