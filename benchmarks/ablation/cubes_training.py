"""Training on the cubes: the steps of a run, one by one or replayed as a CUDA graph.

A step waits for nothing: what it draws is on the device before the training begins, and the learning rate and the
warm-up follow from a step counter there. So on a GPU the whole step can be captured once and replayed, and many runs
can go side by side, each on a stream of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from cubes_data import Cubes, cut, draw, left_by_rate
from cubes_variants import CHANNELS, OF_ALL, Run
from precision import precision_on
from step import CLIP_NORM, Batch, Learner, StockLearner, at_scales, autocast, make_plan

from nnunetv2_mgml.dataloading.masking import build_sampler
from nnunetv2_mgml.objective.base import Progress
from nnunetv2_mgml.plans.options import SamplingOptions

_WIDTHS = (32, 64, 128, 256, 320, 320)
_POLY = 0.9
_EPOCHS = 20
"""In which a training falls for what terms do after each."""
_WARM_UP_STEPS = 6
"""Steps before a graph is captured: lazy set-up and cuDNN's choice of algorithms happen in them."""


class Training:
    """One run on one device.

    Args:
        run: what to train.
        cubes: on the device.
        cases: indices of the training patients.
        graph: capture the step as a CUDA graph and replay it, on a stream of its own; not where steps differ, or a term
            changes between them.
        capacity: most steps that `set_steps` may ask for; None: ``run.steps``.

    Attributes:
        steps: after how many steps the training ends.
        done: steps done, or in the queue of the GPU.
    """

    def __init__(
        self, run: Run, cubes: Cubes, cases: Sequence[int], graph: bool = False, capacity: int | None = None
    ) -> None:
        self.run, self.cubes, self.settings = run, cubes, run.training
        self.device = cubes.images.device
        self.precision = precision_on(self.device)
        self.steps, self.done = run.steps, 0
        self._random: torch.Generator | None = None
        self._default: torch.Generator | None = None
        alike = {**OF_ALL, **run.options}["complete_every"] == 1
        graph = graph and alike and run.options.get("rebalancing", "none") == "none"
        self.stream = torch.cuda.Stream(self.device) if graph else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._marks: list[torch.cuda.Event] = []
        torch.manual_seed(run.seed)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            self._own_random_numbers()
        with self._context():
            self._build(list(cases), max(run.steps, capacity or 0))
        if graph:
            self._capture()

    def _build(self, cases: list[int], capacity: int) -> None:
        settings, run, device = self.settings, self.run, self.device
        stages, patch = settings["stages"], settings["patch"]
        self.plan = make_plan((patch,) * 3, stages, widths=_WIDTHS[:stages])
        if settings["stock"]:
            self.learner: Learner = StockLearner(
                self.plan, device, settings["stock_width_factor"], settings["conditional"]
            )
        else:
            narrow = {"width_factor": settings["width_factor"], "gradient_checkpointing": False}  # time counts here
            self.learner = Learner(self.plan, {**OF_ALL, **run.options, **narrow}, device)
        has = left_by_rate(self.cubes.patients)
        if not settings["lacking"]:
            has[:] = True
        draws = draw(
            cases[: settings["patients"]],
            capacity,
            settings["batch"],
            patch,
            self.cubes.images.shape[-1],
            build_sampler(SamplingOptions() if settings["stock"] else self.learner.options.sampling, CHANNELS),
            run.seed,
            has=has,
        )
        if not settings["stock"]:
            self.learner.objective.begin_training(tuple(map(bool, has[case])) for case in cases[: settings["patients"]])
        if settings["only"]:
            visible = torch.tensor(run.subsets[0]).expand_as(draws.visible).contiguous()
            draws = draws._replace(visible=visible)
        self.draws = type(draws)(*(values.to(device) for values in draws))
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.total = torch.tensor([float(run.steps)], device=device)
        self.losses = torch.zeros(capacity, device=device)
        modules = [(self.learner.network, float(settings["learning_rate"])), *self.learner.extra]
        self.optimizers = [
            torch.optim.Adam(
                module.parameters(),
                torch.tensor(rate, device=device),
                amsgrad=main,
                weight_decay=settings["weight_decay"] if main else 0,
                fused=True,
                capturable=device.type == "cuda",
            )
            for module, rate in modules
            for main in (module is self.learner.network,)
        ]
        self.rates = [rate for _, rate in modules]

    def set_steps(self, steps: int) -> None:
        """Set after how many steps the training ends, and with it the schedules.

        Raises:
            ValueError: more than ``capacity``, for which nothing was drawn.
        """
        if steps > len(self.draws.case):
            raise ValueError(
                f"{self.run.name} would do {steps} steps, but draws were made for {len(self.draws.case)}: raise "
                "_EQUAL_TIME_CAPACITY in cubes_work.py."
            )
        self.steps = steps
        with self._context():
            self.total.fill_(float(self.steps))

    def ready(self) -> bool:
        """Whether at most one earlier call of `advance` is still in the GPU's queue."""
        self._marks = [mark for mark in self._marks if not mark.query()]
        return len(self._marks) < 2

    def advance(self, steps: int) -> None:
        """Do some steps; as a graph they are only put into the GPU's queue."""
        with self._context():
            for _ in range(steps):
                if self.graph is None:
                    self._step()
                else:
                    self.graph.replay()
                self.done += 1
                self._end_epoch()
            if self.stream is not None:
                self._marks.append(torch.cuda.Event())
                self._marks[-1].record()

    def timed(self, steps: int) -> float:
        """Do some steps and return their seconds, a GPU's queue emptied before and after."""
        self.wait()
        start = time.perf_counter()
        self.advance(steps)
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for a GPU's queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context in which the network can be used: on the run's stream."""
        with self._context():
            yield

    def recent_loss(self, steps: int = 100) -> float:
        """Return the mean loss of the last steps; waits for them."""
        with self._context():
            return float(self.losses[max(0, self.done - steps) : self.done].mean())

    def _step(self) -> None:
        draws = self.draws.at(self.counter)
        images, regions = cut(self.cubes, draws, self.settings["patch"])
        batch = Batch(images, at_scales(regions, self.plan), draws.visible, draws.available)
        share = (self.counter / self.total).clamp(max=1).squeeze(0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"].copy_(rate * (1 - share) ** _POLY)
            optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            loss = self.learner.loss(batch, self._ramp(share), self._is_full())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.network.parameters(), CLIP_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
        self.losses.index_copy_(0, self.counter, loss.detach().float().reshape(1))
        self.counter.add_(1)

    def _end_epoch(self) -> None:
        """After the last step of an epoch let the terms do what they do then; a graph's have nothing to do."""
        length = -(-self.steps // _EPOCHS)
        if self.graph is None and not self.settings["stock"] and self.done % length == 0:
            self.learner.objective.end_epoch(Progress(self.done // length - 1, _EPOCHS))

    def _ramp(self, share: torch.Tensor) -> torch.Tensor | float:
        if self.settings["stock"]:
            return 1.0
        fraction = self.learner.options.value("ramp_up_fraction")
        return (share / fraction).clamp(max=1) if fraction > 0 else 1.0

    def _is_full(self) -> bool:
        return bool(self.settings["stock"]) or self.learner.objective.is_full(Progress(0, 1, self.done, self.steps))

    def _capture(self) -> None:
        with self._context():
            for _ in range(_WARM_UP_STEPS):
                self._step()
                self.done += 1
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._step()
        self.graph = graph

    def _own_random_numbers(self) -> None:
        """Give the run a state of the GPU's generator for itself: graphs that shared one would disturb each other."""
        index = self.device.index or 0
        torch.rand(1, device=self.device)  # makes the generator
        self._default = torch.cuda.default_generators[index]
        self._random = self._default.clone_state()
        self._random.manual_seed(self.run.seed)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """The run's stream and random numbers, where it has its own."""
        if self._default is None or self._random is None:
            with nullcontext():
                yield
            return
        before = self._default.graphsafe_get_state()
        self._default.graphsafe_set_state(self._random)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self._default.graphsafe_set_state(before)
