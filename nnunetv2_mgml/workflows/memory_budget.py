"""The largest training step that fits a GPU: batch, patch and width, as nnU-Net plans to a budget.

Only what is too large gets smaller: first the batch, to 2; then the patch, the axis that is longest in mm by the least
its network can divide, to a quarter million voxels; then the width; then the batch, to 1; then the patch again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.memory import GIB, StepMemory, step_memory
from nnunetv2_mgml.plans.topology import replan, smaller_patches

WIDTHS = (0.375, 0.25)
"""Values of ``width_factor`` that are tried."""
_ENOUGH_VOXELS = {2: 2**15, 3: 2**18}
"""Of a patch, by number of axes: smaller ones only when nothing else is left."""

Changes = dict[str, Any]


class Fit(NamedTuple):
    """What was found."""

    changes: Changes
    """``batch_size``, ``patch_size``, ``width_factor``, as far as they change."""
    memory: StepMemory
    """What the step then needs."""


def fit(
    planned: Callable[[Changes], Mapping[str, Any]],
    configuration: str,
    dataset_json: Mapping[str, Any],
    limit: float,
    fixed: Collection[str] = (),
) -> Fit:
    """Return the least changes by which a training step in 16 bit fits.

    Args:
        planned: returns the plans with some changes; with none, what is wanted.
        configuration: name of one of their configurations.
        dataset_json: of the dataset.
        limit: bytes.
        fixed: what the user has chosen, of ``batch_size``, ``patch_size`` and ``width_factor``; ``features_per_stage``
            keeps the number of stages.

    Raises:
        ValueError: nothing allowed is small enough, or plans the network cannot be built of.
    """
    tried: Changes = {}
    memory = step_memory(planned({}), configuration, dataset_json)
    wanted = size = _Size.of(planned({}), configuration)
    rungs = list(_ladder(planned({}), configuration, fixed))
    for changes in rungs:
        if memory.peak <= limit:
            break
        candidate = wanted.changed(changes)
        if size.scaled(memory, candidate) > limit and changes is not rungs[-1]:
            continue  # far from it: need not be counted
        memory, size, tried = step_memory(planned(changes), configuration, dataset_json), candidate, changes
    if memory.peak > limit:
        raise ValueError(
            f"A training step of configuration {configuration} does not fit into {limit / GIB:.2f} GiB: the smallest "
            f"that was tried needs {memory.peak / GIB:.2f}. Let --gpu_memory choose what you have set "
            f"({', '.join(fixed) or 'nothing'}), or choose another fusion design."
        )
    return Fit(tried, memory)


class _Size(NamedTuple):
    batch: int
    voxels: int
    width: float

    @classmethod
    def of(cls, plans: Mapping[str, Any], configuration: str) -> _Size:
        plan = PlansManager(dict(plans)).get_configuration(configuration)
        return cls(plan.batch_size, math.prod(plan.patch_size), Options.from_plans(dict(plans)).network.width_factor)

    def changed(self, changes: Mapping[str, Any]) -> _Size:
        patch: Sequence[int] | None = changes.get("patch_size")
        return _Size(
            changes.get("batch_size", self.batch),
            math.prod(patch) if patch else self.voxels,
            changes.get("width_factor", self.width),
        )

    def scaled(self, memory: StepMemory, other: _Size) -> float:
        """Return what another size needs about: weights by the width's square, the rest by voxels and width."""
        width = other.width / self.width
        rest = (other.batch * other.voxels) / (self.batch * self.voxels) * width
        return memory.weights * width**2 + (memory.peak - memory.weights) * rest


def _ladder(plans: Mapping[str, Any], configuration: str, fixed: Collection[str]) -> Iterator[Changes]:
    """Yield changes, each smaller than the one before."""
    resolved = PlansManager(dict(plans)).get_configuration(configuration)
    width: float = Options.from_plans(dict(plans)).network.width_factor
    batch, changes = resolved.batch_size, Changes()
    if "batch_size" not in fixed:
        for size in range(batch - 1, 1, -1):
            changes = {**changes, "batch_size": size}
            yield changes
    patches = [] if "patch_size" in fixed else list(smaller_patches(resolved.configuration))
    if "features_per_stage" in fixed:
        stages = _stages(resolved.configuration)
        patches = [patch for patch in patches if _stages(resolved.configuration, patch) == stages]
    enough = [patch for patch in patches if math.prod(patch) >= _ENOUGH_VOXELS[len(patch)]]
    for patch in enough:
        changes = {**changes, "patch_size": patch}
        yield changes
    for narrower in () if "width_factor" in fixed else (value for value in WIDTHS if value < width):
        changes = {**changes, "width_factor": narrower}
        yield changes
    if "batch_size" not in fixed and batch > 1:
        changes = {**changes, "batch_size": 1}
        yield changes
    for patch in patches[len(enough) :]:
        changes = {**changes, "patch_size": patch}
        yield changes


def _stages(configuration: dict[str, Any], patch: Sequence[int] | None = None) -> int:
    """Return how many stages the network has, or would have on another patch."""
    planned = configuration if patch is None else replan(configuration, patch)
    stages: int = planned["architecture"]["arch_kwargs"]["n_stages"]
    return stages
