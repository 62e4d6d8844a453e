"""The sections of `gpu.py`: each yields entries of its part of the result, as (name, value), as soon as it has them."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import code_changed, commit, output_of
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from step import (
    DESIGNS,
    TERMS,
    Batch,
    Learner,
    StockLearner,
    TrainingStep,
    autocast,
    make_plan,
    predictions,
    random_batch,
)
from torch import distributed as dist
from torch import multiprocessing
from torch.profiler import ProfilerActivity, profile

from nnunetv2_mgml import __version__
from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion.selective_scan import kernel_scan, mamba_kernel, selective_scan

Entries = Iterator[tuple[str, Any]]
DESIGN = "region_aware"
_SET_UP_SECONDS = 25
"""Of a training on the cubes: imports, reading, the capture of its step."""
_REPEATABLE = {"mask_ratio": 0.0}
"""Options under which the losses draw no random numbers."""


@dataclass(frozen=True)
class Size:
    """Size of a training step."""

    patch: int
    batch: int
    stages: int

    def plan(self) -> ConfigurationManager:
        """Return nnU-Net's plan of this size."""
        return make_plan((self.patch,) * 3, self.stages)


SIZES = {"80^3, batch 1": Size(80, 1, 5), "128^3, batch 2": Size(128, 2, 6)}
"""The paper's training, and nnU-Net's own plan for BraTS."""
_TINY_SIZES = {"16^3, batch 2": Size(16, 2, 3)}


@dataclass(frozen=True)
class Settings:
    """What sections are told.

    Args:
        device: torch device.
        tiny: tiny sizes, few repetitions.
        training_seconds: of the training on the cubes.
        folder: for what sections write.
        commit: of this checkout; None: ask git.
        untimed_done: a file that exists once sections may time things although others run beside them.
    """

    device: str
    tiny: bool
    training_seconds: float
    folder: Path
    commit: str | None
    untimed_done: Path

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.startswith("cuda")

    @property
    def sizes(self) -> dict[str, Size]:
        """Sizes of what is timed."""
        return _TINY_SIZES if self.tiny else SIZES

    @property
    def small(self) -> Size:
        """Size of what is only checked."""
        return Size(16, 2, 3) if self.tiny else Size(32, 2, 4)

    @property
    def designs(self) -> list[str]:
        """Designs that are checked and timed."""
        return [DESIGN, "mmformer"] if self.tiny else list(DESIGNS)

    def synchronise(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    def learner(self, size: Size, design: str = DESIGN, terms: str = "shipped", **options: Any) -> Learner:
        """Return a new network of a design on the device, from a fixed seed."""
        torch.manual_seed(0)
        width = {"width_factor": 0.25} if self.tiny else {}
        return Learner(size.plan(), {**DESIGNS[design], **TERMS[terms], **width, **options}, self.device)

    def steps(self, size: Size, design: str = DESIGN, terms: str = "shipped", **options: Any) -> TrainingStep:
        """Return a training step as nnU-Net does it."""
        batch = random_batch(size.plan(), size.batch, self.device)
        return TrainingStep(self.learner(size, design, terms, **options), batch)

    def stock(self, size: Size) -> TrainingStep:
        """Return the step of stock nnU-Net on the same plan."""
        torch.manual_seed(0)
        learner = StockLearner(size.plan(), self.device, 0.25 if self.tiny else 1.0)
        return TrainingStep(learner, random_batch(size.plan(), size.batch, self.device))


def about(settings: Settings) -> Entries:
    """Machine, versions, commit."""
    yield "date", datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    yield "commit", settings.commit or commit()
    yield "code_changed", code_changed()
    yield "tiny", settings.tiny
    versions = {"python": platform.python_version(), "torch": torch.__version__, "nnunetv2_mgml": __version__}
    for name in ("nnunetv2", "dynamic_network_architectures", "numpy", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    yield "versions", versions
    yield "machine", {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()}
    yield "device", settings.device
    if settings.cuda:
        properties = torch.cuda.get_device_properties(settings.device)
        yield "device_name", properties.name
        yield "device_gibibytes", properties.total_memory / 2**30
        yield "multiprocessors", properties.multi_processor_count
        yield "cuda", torch.version.cuda
        yield "cudnn", torch.backends.cudnn.version()
        query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        yield "nvidia_smi", output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def ceilings(settings: Settings) -> Entries:
    """What the device reaches at best: a large copy (bytes read and written), a large matrix product."""
    count, edge = (2**16, 256) if settings.tiny else (2**30, 8192)
    source = torch.randn(count, device=settings.device)
    target = torch.empty_like(source)
    seconds = _median(settings, functools.partial(target.copy_, source))
    yield "copy_gigabytes_per_second", 2 * 4 * count / seconds / 1e9
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(edge, edge, device=settings.device, dtype=dtype) for _ in range(2))
        seconds = _median(settings, functools.partial(torch.matmul, a, b))
        yield f"matrix_product_teraflops_{str(dtype)[6:]}", 2 * edge**3 / seconds / 1e12


def _median(settings: Settings, function: Callable[[], Any]) -> float:
    return float(np.median(in_turns(settings, {"it": function}, 5)["it"]))


def correctness(settings: Settings) -> Entries:
    """Every design in float32 (no TF32) against the CPU: logits, loss and gradients of one training step."""
    _no_tf32()
    for design in settings.designs:
        yield design, _guarded(lambda design=design: _against_cpu(settings, design))


def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _guarded(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a function, or that it failed and how."""
    try:
        return function()
    except Exception:  # the next design goes on
        return {"failed": traceback.format_exc()}


def _against_cpu(settings: Settings, design: str) -> dict[str, Any]:
    size = settings.small
    plan = size.plan()
    torch.manual_seed(0)
    width = {"width_factor": 0.25} if settings.tiny else {}
    reference = Learner(plan, {**DESIGNS[design], **_REPEATABLE, **width})
    tested = Learner(plan, {**DESIGNS[design], **_REPEATABLE, **width}, settings.device)
    results = []
    for learner, other in ((reference, reference), (tested, reference)):
        for module, source in zip(learner.modules(), other.modules(), strict=True):
            module.load_state_dict(source.state_dict())
            module.eval()  # no dropout, no sampling; the norms have no state
        batch = random_batch(plan, size.batch, next(learner.network.parameters()).device)
        loss = learner.loss(batch)
        loss.backward()
        gradients = [
            p.grad.flatten() for module in learner.modules() for p in module.parameters() if p.grad is not None
        ]
        learner.network.decoder.deep_supervision = False
        with torch.no_grad():
            logits = learner.predict(batch.x, torch.tensor(all_subsets(4), device=batch.x.device))
        results.append([t.detach().cpu().double() for t in (logits, torch.cat(gradients), loss.reshape(1))])
    names = ("logits", "gradient", "loss")
    differences = {}
    for name, wanted, got in zip(names, *results, strict=True):
        differences[f"{name}_relative"] = float((got - wanted).norm() / wanted.norm())
        differences[f"{name}_max"] = float((got - wanted).abs().max())
    return {**differences, "finite": bool(all(t.isfinite().all() for t in results[1]))}


def precision(settings: Settings) -> Entries:
    """Training steps of every design in float16 (with a gradient scaler) and bfloat16: everything stays finite."""
    for design in settings.designs:
        for kind in ("float16", "bfloat16") if settings.cuda else ("bfloat16",):
            yield f"{design} {kind}", _guarded(lambda design=design, kind=kind: _finite_steps(settings, design, kind))


def _finite_steps(settings: Settings, design: str, kind: str) -> dict[str, Any]:
    size = settings.small
    step = TrainingStep(settings.learner(size, design), random_batch(size.plan(), size.batch, settings.device), kind)
    losses = torch.stack([step() for _ in range(2 if settings.tiny else 6)])
    weights = [p for module in step.learner.modules() for p in module.parameters()]
    return {
        "losses": losses.tolist(),
        "finite": bool(losses.isfinite().all() and all(p.isfinite().all() for p in weights)),
        "scale": None if step.scaler is None else step.scaler.get_scale(),
    }


def no_wait(settings: Settings) -> Entries:
    """The step (up to the optimizer) and the prediction of every design never wait for the device; error if they do."""
    size = settings.small
    for design in settings.designs:

        def check(design: str = design) -> dict[str, Any]:
            step = settings.steps(size, design)
            step()
            network = step.learner.network
            subsets = torch.tensor(all_subsets(4), device=settings.device)
            with _waiting_is_an_error(settings):
                step.forward().backward()
            network.eval()
            with torch.inference_mode(), step.autocast():
                for context in (nullcontext(), _waiting_is_an_error(settings)):  # once before, to set everything up
                    with context:
                        network(step.batch.x, modality_mask=step.batch.visible)
                        step.learner.predict(step.batch.x, subsets)
            return {"waits": False}

        yield design, _guarded(check)


class _waiting_is_an_error:  # noqa: N801  reads as what it is
    """PyTorch's own switch: what waits for the GPU raises."""

    def __init__(self, settings: Settings) -> None:
        self.cuda = settings.cuda
        settings.synchronise()

    def __enter__(self) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")


def distributed(settings: Settings) -> Entries:
    """Two processes on one card give the gradients of one with the whole batch; then a step in 16 bit."""
    yield "backend", "gloo, with tensors on the device: NCCL refuses two ranks on one GPU"
    _no_tf32()
    wanted = ddp_gradients(settings, slice(0, 2), distributed=False)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (folder, settings), nprocs=2)
        got = torch.load(Path(folder, "gradients.pt"))
        losses = [torch.load(Path(folder, f"losses_{rank}.pt")) for rank in range(2)]
    yield "same_parameters", set(got) == set(wanted)
    names = sorted(wanted)
    one, two = (torch.cat([gradients[name].flatten() for name in names]) for gradients in (wanted, got))
    yield "gradient_relative", float((two - one).norm() / one.norm())
    yield "gradient_max", float((two - one).abs().max())
    yield "losses", losses
    yield "finite", bool(torch.tensor(losses).isfinite().all())


def ddp_gradients(settings: Settings, samples: slice, distributed: bool) -> dict[str, torch.Tensor]:
    """Return the gradients on some samples of a fixed batch of two, on the CPU."""
    learner, batch = _ddp(settings, samples, distributed)
    learner.loss(batch).backward()
    return {
        f"{index}.{name.replace('.module.', '.')}": p.grad.cpu()  # DDP's wrapper of what a loss term owns
        for index, module in enumerate(learner.modules())
        for name, p in module.named_parameters()
        if p.grad is not None
    }


def _ddp(settings: Settings, samples: slice, distributed: bool) -> tuple[Learner, Batch]:
    plan = Size(16, 2, 3).plan()
    torch.manual_seed(0)
    options = {**DESIGNS[DESIGN], **_REPEATABLE, "width_factor": 0.25}
    learner = Learner(plan, options, settings.device, distributed, every_head=True)
    batch = random_batch(plan, 2, settings.device)
    rows = torch.tensor([[True, False, True, False], [False, True, False, True]], device=settings.device)
    whole = batch._replace(visible=rows)
    return learner, Batch(
        whole.x[samples], [t[samples] for t in whole.targets], whole.visible[samples], whole.available[samples]
    )


def _rank(rank: int, folder: str, settings: Settings) -> None:
    """Be one process of the group; rank 0 stores the reduced gradients."""
    torch.set_num_threads(1)
    _no_tf32()
    if settings.cuda:
        torch.cuda.set_device(torch.device(settings.device).index or 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    gradients = ddp_gradients(settings, slice(rank, rank + 1), distributed=True)
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    step = TrainingStep(*_ddp(settings, slice(rank, rank + 1), distributed=True))
    torch.save([float(step()) for _ in range(3)], f"{folder}/losses_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def mamba(settings: Settings) -> Entries:
    """The CUDA scan of ``mamba_ssm``, where it is installed, against ours."""
    kernel = mamba_kernel()
    yield "installed", kernel is not None
    generator = torch.Generator().manual_seed(0)
    u, delta, b, c = (torch.randn(2, 60, width, generator=generator).to(settings.device) for width in (32, 32, 16, 16))
    inputs = [u, delta.abs(), -torch.rand(32, 16, generator=generator).to(settings.device), b, c]
    inputs.append(torch.ones(32, device=settings.device))
    wanted = selective_scan(*(t.cpu() for t in inputs))
    got = selective_scan(*inputs).cpu()
    yield "ours_relative_to_cpu", float((got - wanted).norm() / wanted.norm())
    if kernel is not None and settings.cuda:
        got = kernel_scan(*inputs).cpu()
        yield "kernel_relative_to_cpu", float((got - wanted).norm() / wanted.norm())


def compiled(settings: Settings) -> Entries:
    """`torch.compile` of the network, as nnU-Net trains by default on a GPU: the default's step against eager.

    Then, compiled alike, the step without our terms and stock nnU-Net's.
    """
    size = next(iter(settings.sizes.values()))
    yield "backend", _backend(settings)
    eager, step = settings.steps(size), settings.steps(size)
    start = time.monotonic()
    try:
        first = _compile(settings, step, full_graph=True)
        yield "full_graph", True
    except torch._dynamo.exc.TorchDynamoException:
        yield "full_graph_error", traceback.format_exc()
        yield "full_graph", False
        torch._dynamo.reset()
        step = settings.steps(size)
        start = time.monotonic()
        first = _compile(settings, step, full_graph=False)
    yield "first_step_seconds", time.monotonic() - start
    yield "first_losses", {"eager": float(eager()), "compiled": float(first)}
    other = torch.tensor([[True, True, True, False], [False, False, False, True]], device=settings.device)
    for rows in (other, ~other):
        step.batch = step.batch._replace(visible=rows[: size.batch])
        loss = step()
    yield "finite", bool(loss.isfinite())
    yield "graphs", int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    steps = {"eager": eager, "compiled": step}
    if settings.cuda:  # on a CPU the compiler takes minutes for each
        steps |= {"plain": settings.steps(size, terms="plain"), "stock": settings.stock(size)}
        for name in ("plain", "stock"):
            _compile(settings, steps[name], full_graph=False)
    while not settings.untimed_done.exists():
        time.sleep(0.2)
    _as_nnunet(settings)
    yield "seconds", in_turns(settings, steps, _turns(settings))
    yield "mebibytes", {name: _peak(settings, it) for name, it in steps.items()}


def _backend(settings: Settings) -> str:
    return "inductor" if settings.cuda else "aot_eager"


def _compile(settings: Settings, step: TrainingStep, full_graph: bool) -> torch.Tensor:
    """Compile the network of a step, do the step once and return its loss."""
    step.learner.called = torch.compile(step.learner.network, backend=_backend(settings), fullgraph=full_graph)
    loss = step()
    settings.synchronise()
    return loss


def counter(settings: Settings) -> Entries:
    """What the same steps keep for the backward pass, counted on shapes alone by `memory.saved_bytes`: GiB."""
    from memory import gibibytes

    for name, size in settings.sizes.items():
        entry = {}
        for terms in TERMS:
            torch.manual_seed(0)
            width = {"width_factor": 0.25} if settings.tiny else {}
            learner = Learner(size.plan(), {**DESIGNS[DESIGN], **TERMS[terms], **width})
            entry[terms] = gibibytes(TrainingStep(learner, random_batch(size.plan(), size.batch), "bfloat16"))
        yield name, entry


def in_turns(
    settings: Settings, functions: Mapping[str, Callable[[], Any]], turns: int, calls: int = 1
) -> dict[str, list[float]]:
    """Return seconds of each function in every turn (mean of some calls in a row), after one untimed turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            settings.synchronise()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            settings.synchronise()
            if turn:
                times[name].append((time.perf_counter() - start) / calls)
    return times


def _turns(settings: Settings) -> int:
    return 2 if settings.tiny else 9


def _peak(settings: Settings, step: TrainingStep) -> dict[str, float]:
    """Return the allocator's peak over two steps and what it held before them, in MiB; nothing without a GPU."""
    if not settings.cuda:
        return {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        step()
    settings.synchronise()
    return {
        "peak": torch.cuda.max_memory_allocated() / 2**20,
        "reserved": torch.cuda.max_memory_reserved() / 2**20,
        "before": before / 2**20,
    }


def training_step(settings: Settings) -> Entries:
    """Time and peak memory of a step: without our terms, with the paper's, the default, and stock nnU-Net's."""
    _as_nnunet(settings)
    for name, size in settings.sizes.items():
        steps: dict[str, Callable[[], TrainingStep]] = {
            **{terms: lambda terms=terms, size=size: settings.steps(size, terms=terms) for terms in TERMS},
            "stock": lambda size=size: settings.stock(size),
        }
        memory = {}
        for what, make in steps.items():  # one at a time: the peak is then its own
            step = make()
            step()
            memory[what] = _peak(settings, step)
            del step
        yield f"{name} mebibytes", memory
        made = {what: make() for what, make in steps.items()}
        million = {what: sum(p.numel() for p in step.learner.network.parameters()) / 1e6 for what, step in made.items()}
        yield f"{name} million", million
        yield f"{name} seconds", in_turns(settings, made, _turns(settings), 1 if settings.tiny else 3)
        del made
        _empty(settings)


def _as_nnunet(settings: Settings) -> None:
    """As nnU-Net's run_training sets it."""
    torch.backends.cudnn.benchmark = settings.cuda


def _empty(settings: Settings) -> None:
    if settings.cuda:
        torch.cuda.empty_cache()


def prediction(settings: Settings) -> Entries:
    """A patch predicted from four modalities, from one, and for all 15 subsets, under autocast."""
    _as_nnunet(settings)
    for name, size in settings.sizes.items():
        yield f"{name} seconds", _predict(settings, size, DESIGN)


def _predict(settings: Settings, size: Size, design: str, separately: bool = True) -> dict[str, list[float]]:
    learner = settings.learner(size, design)
    batch = random_batch(size.plan(), 1, settings.device)
    kind = "float16" if settings.cuda else "float32"
    functions = predictions(learner, batch.x, all_subsets(4))
    if not separately:
        del functions["separately"]
    with torch.inference_mode(), autocast(batch.x.device, kind):
        return in_turns(settings, functions, max(2, _turns(settings) // 2))


def designs(settings: Settings) -> Entries:
    """Every design on the paper's plan: steps, peak memory of the default's, prediction."""
    _as_nnunet(settings)
    size = next(iter(settings.sizes.values()))
    for design in settings.designs:
        yield design, _guarded(lambda design=design: _design(settings, size, design))


def _design(settings: Settings, size: Size, design: str) -> dict[str, Any]:
    memory = {}
    for terms in ("plain", "shipped"):
        step = settings.steps(size, design, terms)
        step()
        memory[terms] = _peak(settings, step)
        del step
    steps = {terms: settings.steps(size, design, terms) for terms in TERMS}
    seconds = in_turns(settings, steps, max(2, _turns(settings) // 2), 1 if settings.tiny else 2)
    del steps
    _empty(settings)
    return {"seconds": seconds, "mebibytes": memory, "prediction": _predict(settings, size, design, False)}


def graph(settings: Settings) -> Entries:
    """The default's step on the cubes captured as a CUDA graph: it does what single steps do, and how much faster."""
    sys.path.insert(0, str(Path(__file__).parent / "ablation"))
    from cubes_data import Cubes
    from cubes_training import Training
    from cubes_variants import Run
    from cubes_work import seconds_per_step

    if not settings.cuda:
        yield "skipped", "needs CUDA"
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 4, 32, 32, 32, generator=generator)
    regions = torch.stack([images[:, 0] > level for level in (0.5, 1.0, 1.5)], 1)
    cubes = Cubes(images, regions, [f"noise_{n}" for n in range(8)]).to(torch.device(settings.device, 0))
    for variant in ("mgml", "baseline", "modality_dropout"):
        losses, seconds = {}, {}
        for how in ("eager", "graph"):
            training = Training(Run(variant, 0, 200), cubes, range(8), how == "graph")
            training.advance(12 - training.done)
            with training.evaluating():
                losses[how] = training.losses[:12].tolist()
            seconds[how] = seconds_per_step(training)
        yield variant, {"losses": losses, "seconds_per_step": seconds}


def profiled(settings: Settings) -> Entries:
    """Where the time of the default's step goes: kernels, and parts of the forward pass."""
    _as_nnunet(settings)
    for name, size in settings.sizes.items():
        step = settings.steps(size)
        yield f"{name} parts", parts(settings, step)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if settings.cuda else [])]
        start = time.perf_counter()
        with profile(activities=activities) as recorded:
            step()
            settings.synchronise()
        wall = time.perf_counter() - start
        key = "self_device_time_total" if settings.cuda else "self_cpu_time_total"
        events = [e for e in recorded.key_averages() if not settings.cuda or e.device_type.name == "CUDA"]
        events.sort(key=lambda e: -getattr(e, key))
        yield (
            f"{name} kernels",
            {
                "count": sum(e.count for e in events),
                "milliseconds": sum(getattr(e, key) for e in events) / 1e3,
                "milliseconds_wall_profiled": wall * 1e3,
                "largest": [
                    {"name": e.key[:120], "count": e.count, "milliseconds": getattr(e, key) / 1e3} for e in events[:25]
                ],
            },
        )
        del step, recorded, events
        _empty(settings)


def parts(settings: Settings, step: TrainingStep) -> dict[str, list[float]]:
    """Return seconds of encoders, one decoding, the shared decoder and the network, forward only, and of the stages."""
    network, batch = step.learner.network, step.batch
    view = step.learner.objective.draw_view(batch.visible, batch.available)
    with step.autocast():
        features = [f.detach() for f in network.encode(batch.x)]

    def under_autocast(function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with step.autocast():
                function()

        return run

    functions: dict[str, Callable[[], Any]] = {
        "encode": under_autocast(lambda: network.encode(batch.x)),
        "fuse_decode": under_autocast(lambda: network.fuse_decode(features, batch.visible)),
        "network": under_autocast(lambda: network(batch.x, view, step.learner.objective.needs)),
        "decode_modalities": under_autocast(lambda: network.decode_modalities(features)),
        "forward_and_loss": step.forward,
        "with_backward": lambda: step.forward().backward(),
        "step": step,
    }
    return in_turns(settings, functions, max(2, _turns(settings) // 2))


def training(settings: Settings) -> Entries:
    """The default trained on the cubes of real patients for some time: loss curve and Dice on validation patients."""
    command = [sys.executable, str(Path(__file__).parent / "ablation" / "cubes.py")]
    output = settings.folder / "gpu_cubes"
    short = ["--steps", "4", "--points", "1"] if settings.tiny else ["--steps", "20000", "--points", "12"]
    if not settings.cuda and not settings.tiny:
        short = ["--steps", "1500", "--points", "6"]
    command += ["--variants", "mgml", "--seeds", "0", *short, "--device", settings.device.partition(":")[0]]
    seconds = settings.training_seconds + _SET_UP_SECONDS
    command += ["--seconds", str(seconds), "--output", str(output), "--again", "--parts_only"]
    command += ["--commit", settings.commit] if settings.commit else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    parts = list(output.glob("part_*.json"))
    if done.returncode or len(parts) != 1:
        raise RuntimeError(f"cubes.py ended with exit code {done.returncode}:\n{done.stdout[-3000:]}")
    (content,) = json.loads(parts[0].read_text())
    shutil.rmtree(output)
    wanted = (
        "variant",
        "steps",
        "seconds",
        "seconds_per_step_alone",
        "how",
        "curve",
        "validation",
        "training",
        "split",
    )
    for key in wanted:
        yield key, content[key]


FUNCTIONS: dict[str, Callable[[Settings], Entries]] = {
    "about": about,
    "no_wait": no_wait,
    "correctness": correctness,
    "precision": precision,
    "distributed": distributed,
    "mamba": mamba,
    "compile": compiled,
    "counter": counter,
    "ceilings": ceilings,
    "training_step": training_step,
    "prediction": prediction,
    "graph": graph,
    "training": training,
    "designs": designs,
    "profile": profiled,
}
"""By the names of `gpu.SECTIONS`."""
