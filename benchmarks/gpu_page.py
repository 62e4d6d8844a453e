"""Writes docs/gpu.md from what `gpu.py` measured; what is not there reads "not measured".

python benchmarks/gpu_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cost_page import ratios, scatter
from step import DESIGNS

from nnunetv2_mgml.io.files import write_text

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
NOT_MEASURED = "not measured"
_SIZES = ("80^3, batch 1", "128^3, batch 2")
_STEPS = {"plain": "without our terms", "mgml": "Meta-AMF, L_CR", "shipped": "default", "stock": "stock nnU-Net"}
_GOALS = (
    ("step with Meta-AMF and L_CR / without", "training_step", "seconds", "mgml", "plain", "1.08"),
    ("the default's step / without our terms", "training_step", "seconds", "shipped", "plain", "1.20"),
    ("its peak memory", "training_step", "mebibytes", "shipped", "plain", "1.15"),
    ("the default's step / stock nnU-Net's", "training_step", "seconds", "shipped", "stock", "1.00"),
    ("its peak memory / stock nnU-Net's", "training_step", "mebibytes", "shipped", "stock", "1.10"),
    ("a patch from one modality / from four", "prediction", "seconds", "one", "four", "0.40"),
    ("a patch for 15 subsets / for one", "prediction", "seconds", "fifteen", "four", "3.00"),
)
"""What, section, entry, numerator, denominator, at most."""
_PARTS = ("encode", "fuse_decode", "decode_modalities", "forward_and_loss", "with_backward", "step")
_OLDER = {
    "b6165e5": "**Measured with an encoder per modality, full steps only and plain norms, the default of then, without "
    "gradient checkpointing, with the decoder shared by all modalities at full resolution, and before 1x1 convolutions "
    "became convolutions again.** A step that is not compiled, as these, now keeps less than half of this memory "
    "(`python benchmarks/memory.py --width_factor 0.5` counts 0.4 GiB at 80^3 and 2.7 at 128^3 for today's default, "
    "which has 4.1 and 6.9 million parameters) and takes another time, not measured yet. What made `demoseg`, `hemis`, "
    "`sfusion` and `demoseg_early` wait for the GPU has been taken out since: `tests/benchmarks/test_fake_gpu.py` "
    "looks for such waits without a GPU; on one this was not repeated. The training on the cubes had 3 seconds left of "
    "the 90 it is to have.\n"
}
"""Commit of a result -> what has changed in the code since."""
_HEAD = """# On a GPU

Made by `python benchmarks/gpu_page.py` from `benchmarks/results/gpu.json`, which `python benchmarks/gpu.py` writes on a
machine with CUDA: {where}. Steps as nnU-Net does them: float16 autocast with a gradient scaler, gradients clipped,
`cudnn.benchmark`. Ratios are medians of the ratios of turns in one process; *scatter* is how far nine of ten turns lie
from them at most. Four modalities, three regions, `region_aware`, default widths; stock nnU-Net at the plan's own.
"""


def main() -> None:
    """Write the page."""
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    write_text(PAGE, page(result))
    print(f"wrote {PAGE}")


def page(result: Mapping[str, Any]) -> str:
    """Return the page for a result of `gpu.py`, complete or not."""
    sizes = [size for size in result.get("counter", {}) if "^3" in size] or list(_SIZES)
    parts = (
        _HEAD.format(where=_where(result.get("about", {}))),
        *(note for commit, note in _OLDER.items() if str(find(result, "about", "commit")).startswith(commit)),
        *([f"How it was made: {note}\n"] if (note := find(result, "about", "note")) else []),
        _goals(result, sizes),
        _steps(result, sizes),
        _checks(result),
        _designs(result),
        _profile(result, sizes),
        _training(result.get("training", {})),
    )
    return "\n".join(parts)


def find(result: Any, *keys: str) -> Any:
    """Return what lies below some keys, or None where one is missing."""
    for key in keys:
        if not isinstance(result, Mapping) or key not in result:
            return None
        result = result[key]
    return result


def shown(value: float | None, form: str = ".1f", factor: float = 1) -> str:
    """Return a number times a factor as text; None was not measured."""
    return NOT_MEASURED if value is None else format(factor * value, form)


def median(times: Sequence[float] | None) -> float | None:
    """Return the median, of nothing None."""
    return statistics.median(times) if times else None


def ratio(measured: Mapping[str, Any] | None, one: str, other: str) -> str:
    """Return the ratio of two things: times with their scatter, or peak memories."""
    if not find(measured, one) or not find(measured, other):
        return NOT_MEASURED
    assert measured is not None
    if isinstance(measured[one], Mapping):
        return f"{measured[one]['peak'] / measured[other]['peak']:.2f}"
    values = ratios(dict(measured), one, other)
    return f"{statistics.median(values):.2f} (scatter {scatter(values):.0%})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def _where(about: Mapping[str, Any]) -> str:
    if "device_name" not in about:
        return "made without a GPU, to see that it works" if about else "**no GPU yet, nothing here is measured**"
    versions = about["versions"]
    return (
        f"{about['device_name']}, torch {versions['torch']}, nnunetv2 {versions['nnunetv2']}, commit "
        f"{str(about['commit'])[:9]}, {str(about['date'])[:10]}"
    )


def _goals(result: Mapping[str, Any], sizes: Sequence[str]) -> str:
    rows = (
        [what, *(ratio(find(result, section, f"{size} {entry}"), one, other) for size in sizes), goal]
        for what, section, entry, one, other, goal in _GOALS
    )
    return "## The ratios\n\n" + table(["what", *sizes, "goal: at most"], rows)


def _steps(result: Mapping[str, Any], sizes: Sequence[str]) -> str:
    rows = (
        [
            size,
            name,
            shown(median(find(result, "training_step", f"{size} seconds", step)), factor=1e3),
            shown(find(result, "training_step", f"{size} mebibytes", step, "peak"), ".2f", 1 / 1024),
            "-" if step == "stock" else shown(find(result, "counter", size, step), ".2f"),
            shown(find(result, "training_step", f"{size} million", step)),
        ]
        for size in sizes
        for step, name in _STEPS.items()
    )
    return (
        "## A training step\n\n*Counted*: what the step keeps for its backward pass, with weights, gradients and "
        "momentum, on shapes without data: a lower bound. Parameters with the shared modality decoder, which only "
        "training has.\n\n" + table(["size", "step", "ms", "peak memory, GiB", "counted, GiB", "parameters, M"], rows)
    )


def _checks(result: Mapping[str, Any]) -> str:
    rows = [
        [
            f"`{design}`",
            shown(find(entry, "logits_max"), ".1e"),
            shown(find(entry, "gradient_relative"), ".1e"),
            _said(find(result, "precision", f"{design} float16"), "finite", "finite", "not finite"),
            _said(find(result, "precision", f"{design} bfloat16"), "finite", "finite", "not finite"),
            _waits(find(result, "no_wait", design)),
        ]
        for design, entry in _entries(result.get("correctness", {})).items()
    ]
    head = ["design", "logits, max difference", "gradient, relative", "float16", "bfloat16", "waits for the GPU"]
    checks = table(head, rows) if rows else f"Designs against the CPU: {NOT_MEASURED}.\n"
    return (
        "## Checks\n\nForward pass (all 15 subsets) and gradients of every design in float32 without TF32 against the "
        "CPU; whether training steps in 16 bit stay finite, and whether a step or a prediction waits for the GPU.\n\n"
        + checks
        + "\n"
        + "\n".join(f"- {line}" for line in _other_checks(result))
        + "\n"
    )


def _said(entry: Mapping[str, Any] | None, key: str, yes: str, no: str) -> str:
    if entry is None:
        return NOT_MEASURED
    return "failed" if "failed" in entry else yes if entry[key] else no


def _waits(entry: Mapping[str, Any] | None) -> str:
    """Say whether a design waits; PyTorch was told to raise an error where it does."""
    if entry is not None and "called a synchronizing CUDA operation" in entry.get("failed", ""):
        return "yes"
    return _said(entry, "waits", "yes", "no")


def _other_checks(result: Mapping[str, Any]) -> list[str]:
    ddp, mamba, compiled, ceilings = (result.get(name, {}) for name in ("distributed", "mamba", "compile", "ceilings"))
    kernel = shown(mamba.get("kernel_relative_to_cpu"), ".1e")
    if mamba.get("installed") is False:
        kernel += " (not installed)"
    return [
        "Two processes on one card (gloo; NCCL refuses two ranks on one GPU) against one process with the whole batch: "
        f"gradients differ by {shown(ddp.get('gradient_relative'), '.1e')}, relative; in 16 bit "
        f"{_said(ddp if 'finite' in ddp else None, 'finite', 'finite', 'not finite')}.",
        f"`torch.compile` of the network, {_graph(compiled)}: first step after "
        f"{shown(compiled.get('first_step_seconds'))} s, "
        f"{shown(compiled.get('graphs'), '.0f')} graph(s) for three masks; compiled / eager step "
        f"{ratio(compiled.get('seconds'), 'compiled', 'eager')}. Compiled alike, as nnU-Net does by default on a GPU: "
        f"default / without our terms {ratio(compiled.get('seconds'), 'compiled', 'plain')}, "
        f"default / stock nnU-Net {ratio(compiled.get('seconds'), 'compiled', 'stock')}.",
        f"The step on the cubes, as a CUDA graph / one by one: {_graphs(result.get('graph', {}))}.",
        f"Scan of `mamba_ssm` against the CPU, relative: {kernel}; ours on the GPU: "
        f"{shown(mamba.get('ours_relative_to_cpu'), '.1e')}.",
        f"What the device reaches: copy {shown(ceilings.get('copy_gigabytes_per_second'), '.0f')} GB/s, matrix product "
        f"{shown(ceilings.get('matrix_product_teraflops_float16'), '.0f')} TFLOP/s in float16.",
    ]


def _graph(compiled: Mapping[str, Any]) -> str:
    if "full_graph" not in compiled:
        return NOT_MEASURED
    return "without a break" if compiled["full_graph"] else "with breaks"


def _entries(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if isinstance(value, dict)}


def _graphs(section: Mapping[str, Any]) -> str:
    said = []
    for variant, entry in _entries(section).items():
        seconds, losses = entry["seconds_per_step"], entry["losses"]
        away = max(abs(a - b) for a, b in zip(losses["eager"], losses["graph"], strict=True))
        said.append(
            f"`{variant}` {1e3 * seconds['graph']:.1f} / {1e3 * seconds['eager']:.1f} ms (losses of 12 steps within "
            f"{away:.0e})"
        )
    return ", ".join(said) or NOT_MEASURED


def _designs(result: Mapping[str, Any]) -> str:
    rows = [
        [
            f"`{design}`",
            shown(median(find(entry, "seconds", "plain")), factor=1e3),
            *(ratio(find(entry, "seconds"), step, "plain") for step in ("mgml", "shipped")),
            shown(find(entry, "mebibytes", "shipped", "peak"), ".2f", 1 / 1024),
            shown(median(find(entry, "prediction", "four")), factor=1e3),
            *(ratio(find(entry, "prediction"), what, "four") for what in ("one", "fifteen")),
        ]
        for design, entry in _entries(result.get("designs", {})).items()
    ]
    head = ["design", "step, ms", "MGML", "default", "default's peak, GiB", "patch, ms", "one modality", "15 subsets"]
    body = table(head, rows) if rows else f"{NOT_MEASURED.capitalize()}.\n"
    missing = [f"`{name}`" for name in DESIGNS if name not in result.get("designs", {})] if rows else []
    body += f"\n{NOT_MEASURED.capitalize()}: {', '.join(missing)}.\n" if missing else ""
    return f"## Every design\n\nOn the paper's plan; compare with the CPU's [costs.md](costs.md).\n\n{body}"


def _profile(result: Mapping[str, Any], sizes: Sequence[str]) -> str:
    rows = (
        [part, *(shown(median(find(result, "profile", f"{size} parts", part)), factor=1e3) for size in sizes)]
        for part in _PARTS
    )
    lines = [
        "## Where the default's step goes",
        "",
        "Milliseconds; the first three are forward passes, each alone.",
        "",
        table(["part", *sizes], rows),
    ]
    for size in sizes:
        kernels = find(result, "profile", f"{size} kernels")
        if kernels:
            largest = (
                [f"`{kernel['name'].replace('|', '/')}`", str(kernel["count"]), f"{kernel['milliseconds']:.2f}"]
                for kernel in kernels["largest"][:10]
            )
            lines += [
                f"{size}: {kernels['count']} kernels, {kernels['milliseconds']:.1f} ms together. The largest:",
                "",
                table(["kernel", "calls", "ms"], largest),
            ]
    return "\n".join(lines)


def _training(section: Mapping[str, Any]) -> str:
    head = "## A short training on real patients\n\n"
    if "validation" not in section:
        return head + f"{NOT_MEASURED.capitalize()}.\n"
    rows = (
        [str(point["step"]), f"{point['seconds']:.0f}", f"{point['loss']:.3f}", f"{point['mean']:.1f}"]
        for point in section["curve"]
    )
    regions = " / ".join(f"{value:.1f}" for value in section["validation"]["regions"].values())
    counts = ", ".join(f"{number}: {value:.1f}" for number, value in section["validation"]["by_count"].items())
    return (
        f"{head}The default on the cubes (`benchmarks/ablation/cubes.py`), {section['steps']} steps of "
        f"{1e3 * section['seconds_per_step_alone']:.1f} ms. Dice in percent on {section['split']['validation']} "
        "validation patients, mean over 15 subsets and three regions.\n\n"
        + table(["step", "seconds", "loss", "Dice"], rows)
        + f"\nAt the end WT / TC / ET {regions}; by number of modalities {counts}.\n"
    )


if __name__ == "__main__":
    main()
