"""What the files of one case show: intensities, coverage, copies, headers (runs in workers, imports no torch)."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunetv2_mgml.io.forms import read_forms
from nnunetv2_mgml.io.grid import image_difference
from nnunetv2_mgml.io.volumes import read_image, whole_numbers
from nnunetv2_mgml.plans.cohort import RawCase

SAME_CORRELATION = 0.9999
"""Correlation from which two sequences count as one up to brightness and contrast."""

LEAST_UNCOVERED = 0.02
"""Share of what the other sequences show from which a sequence counts as not covering it."""

_SAMPLES = 200_000
_SKEW = 1e-4


@dataclass(frozen=True)
class ChannelCheck:
    """One sequence of a case. Inside is where it differs from its background, the value of its corners."""

    median: float
    """Of the intensities inside."""
    high: float
    """Their 99th percentile."""
    spread: float
    """Their interquartile range."""
    volume_ml: float
    """Volume inside."""
    uncovered_ml: float
    """Volume that most of the other sequences show and this one does not."""
    digest: str
    """Of the voxels: equal for equal sequences."""


@dataclass
class CaseCheck:
    """One case."""

    name: str
    channels: dict[int, ChannelCheck] = field(default_factory=dict)
    """Channel index -> what was found; placeholders and unreadable files are not in it."""
    placeholders: tuple[int, ...] = ()
    """Channels whose volume has one value everywhere."""
    label_ml: dict[int, float] | None = None
    """Label value above 0 -> volume in ml, the ignore label's too; None where there is no label map to be read."""
    findings: list[str] = field(default_factory=list)
    """What is wrong, or strange, in plain words."""


def check_case(job: tuple[RawCase, tuple[str, ...]]) -> CaseCheck:
    """Look at one case.

    Args:
        job: the case, and the modality names in channel order.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    case, channels = job
    result = CaseCheck(case.name)
    volumes: dict[int, NDArray[Any]] = {}
    inside: dict[int, NDArray[np.bool_]] = {}
    reference: sitk.Image | None = None
    placeholders = []
    for channel, path in case.files.items():
        try:
            image = read_image(path)
        except (ValueError, FileNotFoundError) as error:
            result.findings.append(str(error))
            continue
        result.findings += [f"{channels[channel]}: {text}" for text in _header(path)]
        values = sitk.GetArrayFromImage(image).astype(np.float32)
        if not np.any(values != values.flat[0]):
            placeholders.append(channel)
            continue
        difference = image_difference(image, reference) if reference is not None else ""
        if difference:
            result.findings.append(f"{channels[channel]} is not on the grid of {channels[min(volumes)]}: {difference}")
            continue
        reference = reference if reference is not None else image
        volumes[channel], inside[channel] = values, _inside(values)
    result.placeholders = tuple(placeholders)
    if reference is None:
        result.findings.append("no sequence with any content could be read")
        return result
    voxel_ml = float(np.prod(reference.GetSpacing())) / 1000
    for channel, values in volumes.items():
        result.channels[channel] = _measure(values, channel, inside, voxel_ml)
    result.findings += _copies(volumes, inside, channels) + _uncovered(result.channels, channels)
    if case.label.exists():
        _look_at_label(case.label, reference, voxel_ml, result)
    else:
        result.findings.append(f"no label map: {case.label} does not exist, and nnU-Net needs one of every case")
    return result


def _inside(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where a volume differs from its background; everywhere where it has none."""
    corners = values[np.ix_(*([0, -1] for _ in values.shape))].ravel()
    found, counts = np.unique(corners, return_counts=True)
    mask: NDArray[np.bool_] = values != found[int(np.argmax(counts))]
    return mask if counts.max() > 1 and mask.mean() < 0.99 else np.ones_like(mask)


def _measure(values: NDArray[Any], channel: int, inside: dict[int, NDArray[np.bool_]], voxel_ml: float) -> ChannelCheck:
    own = inside[channel]
    low, median, upper, high = np.percentile(values[own], (25, 50, 75, 99))
    others = [mask for c, mask in inside.items() if c != channel]
    uncovered = 0.0
    if others:
        shown = np.sum(others, axis=0, dtype=np.uint8) * 2 > len(others)
        uncovered = float(np.count_nonzero(shown & ~own)) * voxel_ml
    digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()
    return ChannelCheck(
        float(median), float(high), float(upper - low), float(np.count_nonzero(own)) * voxel_ml, uncovered, digest
    )


def _copies(
    volumes: dict[int, NDArray[Any]], inside: dict[int, NDArray[np.bool_]], channels: tuple[str, ...]
) -> list[str]:
    findings = []
    for a, b in itertools.combinations(volumes, 2):
        where = np.flatnonzero(inside[a] | inside[b])
        where = where[:: max(1, len(where) // _SAMPLES)]
        first, second = volumes[a].ravel()[where], volumes[b].ravel()[where]
        if np.array_equal(volumes[a], volumes[b]):
            findings.append(f"{channels[a]} and {channels[b]} are the same volume, voxel for voxel")
        elif len(where) > 1 and first.std() > 0 and second.std() > 0:
            correlation = float(np.corrcoef(first, second)[0, 1])
            if abs(correlation) > SAME_CORRELATION:
                findings.append(
                    f"{channels[a]} and {channels[b]} are one volume up to brightness and contrast (correlation "
                    f"{correlation:.5f})"
                )
    return findings


def _uncovered(found: dict[int, ChannelCheck], channels: tuple[str, ...]) -> list[str]:
    findings = []
    for channel, check in found.items():
        others = [other.volume_ml for c, other in found.items() if c != channel]
        if others and check.uncovered_ml > LEAST_UNCOVERED * float(np.median(others)):
            findings.append(
                f"{channels[channel]} covers less than the other sequences: {check.uncovered_ml:.0f} ml of "
                f"{float(np.median(others)):.0f} ml are missing"
            )
    return findings


def _header(path: Path) -> Iterator[str]:
    """Yield what is odd in a NIfTI header."""
    forms = read_forms(path)
    if forms is None:
        return
    for name, affine in (("sform", forms.sform), ("qform", forms.qform)):
        if affine is not None and _skew(affine) > _SKEW:
            yield f"{name} has skewed axes"
    if forms.sform is None and forms.qform is None:
        yield "neither sform nor qform is set, so its place in space is not known"
    elif forms.disagreement:
        yield f"sform and qform disagree (up to {forms.disagreement:.3g} mm)"


def _skew(affine: NDArray[Any]) -> float:
    """Return the largest cosine between two axes."""
    axes = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def _look_at_label(path: Path, reference: sitk.Image, voxel_ml: float, result: CaseCheck) -> None:
    try:
        image = read_image(path)
        labels = whole_numbers(path, sitk.GetArrayViewFromImage(image))
    except (ValueError, FileNotFoundError) as error:
        result.findings.append(str(error))
        return
    result.findings += [f"label map: {text}" for text in _header(path)]
    difference = image_difference(image, reference)
    if difference:
        result.findings.append(f"the label map is not on the grid of the images: {difference}")
    values, counts = np.unique(labels, return_counts=True)
    result.label_ml = {int(v): float(n) * voxel_ml for v, n in zip(values, counts, strict=True) if v > 0}
    if not result.label_ml:
        result.findings.append("the label map is empty")
