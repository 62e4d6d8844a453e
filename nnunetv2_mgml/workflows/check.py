"""``mgml check``: what a raw data set has, what it lacks, what is strange in it, and what to do about that."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunetv2_mgml.dataset_conversion.splits import parse_ratio, random_split
from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.io.workers import run_jobs
from nnunetv2_mgml.modalities import Subset, channel_names, subset_name
from nnunetv2_mgml.plans.cohort import PATIENTS_FILE, SITES_FILE, RawCase, raw_cases, read_dataset_json, read_groups
from nnunetv2_mgml.plans.folders import PREPROCESSED, RAW, dataset_folder
from nnunetv2_mgml.plans.splits import read_splits
from nnunetv2_mgml.presentation.figures.cohort import cohort_page
from nnunetv2_mgml.presentation.figures.style import save
from nnunetv2_mgml.scoring.regions import LabelSet, label_set
from nnunetv2_mgml.scoring.sources import file_ending
from nnunetv2_mgml.workflows.check_associations import Association, associations_of
from nnunetv2_mgml.workflows.check_case import CaseCheck, check_case

OUTLIER = 6.0
"""Distance from the median, in robust standard deviations, from which an intensity is an outlier."""

FEWEST_FOR_OUTLIERS = 8
_RATIO = "4:1"
UNEVEN = 1.5
"""How much more often one modality is there than another for the rates to count as uneven."""


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """Which data set to look at, and where what was found goes."""

    dataset: int | str
    """Id or name; its raw data are read."""
    output: Path | None = None
    """Folder for ``check.json`` and ``check.png``; None writes nothing."""
    num_processes: int | None = None
    """Worker processes; None for the smaller of 4 and the number of CPUs."""
    show_progress: bool = True


@dataclass(frozen=True)
class Proposal:
    """Something to do, and the command for it."""

    why: str
    command: str = ""
    """Empty where no single command does it."""


@dataclass(frozen=True)
class DatasetCheck:
    """What `check_dataset` found."""

    dataset: str
    channels: tuple[str, ...]
    subsets: dict[str, Subset]
    """Training case -> modalities it has, placeholders left out."""
    splits: dict[str, tuple[str, ...]]
    """Part of the data (``training``, ``fold 0 validation``, ``imagesTs``) -> cases."""
    test_subsets: dict[str, Subset]
    """The same as ``subsets`` for the cases of ``imagesTs``, by their files alone."""
    cases: tuple[CaseCheck, ...]
    sites: dict[str, str]
    associations: tuple[Association, ...]
    """The significant ones."""
    findings: dict[str, tuple[str, ...]]
    """Case -> what is wrong or strange."""
    proposals: tuple[Proposal, ...]
    planned: bool = True
    """Whether nnU-Net has planned it on this machine, so that `mgml plan` has plans to start from."""
    patients: dict[str, str] = dataclasses.field(default_factory=dict)
    """Case -> patient, where the source named them."""
    num_training: int | None = None
    """What dataset.json says how many training cases there are; None where it does not."""
    in_folders: bool = True
    """Whether its files lie in ``imagesTr`` and ``labelsTr``, where `mgml convert split` looks for them."""

    @property
    def dataset_id(self) -> str:
        """The id in the data set's name, as commands take it."""
        return str(int(self.dataset[len("Dataset") :].split("_")[0]))

    @property
    def placeholders(self) -> dict[str, tuple[str, ...]]:
        """Case -> modalities that are placeholder volumes and not recorded as missing."""
        return {
            case.name: tuple(self.channels[c] for c in case.placeholders) for case in self.cases if case.placeholders
        }

    def count(self, part: str) -> dict[str, int]:
        """Return modality -> number of cases of a part of the data that have it."""
        known = {**self.test_subsets, **self.subsets}
        return {
            name: sum(known[case][c] for case in self.splits[part] if case in known)
            for c, name in enumerate(self.channels)
        }

    def combinations(self) -> dict[str, int]:
        """Return combination (``t1+flair``) -> number of training cases, the most frequent first."""
        return dict(Counter(subset_name(subset, self.channels) for subset in self.subsets.values()).most_common())

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "dataset": self.dataset,
            "channels": list(self.channels),
            "cases": {
                case.name: {
                    "modalities": [n for n, there in zip(self.channels, self.subsets[case.name], strict=True) if there],
                    "site": self.sites.get(case.name),
                    "label_ml": case.label_ml,
                    "intensities": {
                        self.channels[c]: dataclasses.asdict(channel) for c, channel in case.channels.items()
                    },
                    "findings": list(self.findings.get(case.name, ())),
                }
                for case in self.cases
            },
            "parts": {part: {"cases": len(names), **self.count(part)} for part, names in self.splits.items()},
            "combinations": self.combinations(),
            "placeholders": self.placeholders,
            "associations": [dataclasses.asdict(association) for association in self.associations],
            "proposals": [dataclasses.asdict(proposal) for proposal in self.proposals],
        }


def check_dataset(request: CheckRequest) -> DatasetCheck:
    """Look at every training case of a raw data set and, with ``output``, write what was found.

    Raises:
        FileNotFoundError, ValueError: no such data set, or one that nnU-Net could not use either.
    """
    folder = dataset_folder(request.dataset, RAW)
    description = read_dataset_json(folder)
    channels = channel_names(description)
    cases = raw_cases(folder)
    test = raw_cases(folder, "Ts") if _has_test_images(folder, description) else []
    jobs = [(case, channels) for case in cases]
    checks = tuple(run_jobs(check_case, jobs, request.num_processes, "Checking", request.show_progress))
    subsets = {
        case.name: tuple(c in case.files and c not in check.placeholders for c in range(len(channels)))
        for case, check in zip(cases, checks, strict=True)
    }
    sites = read_groups(folder, SITES_FILE)
    labels = label_set(description) if "labels" in description else None
    findings = _findings(checks, channels, labels) | _labels_alone(folder, description, subsets)
    ignore_label = None if labels is None else labels.ignore_label
    result = DatasetCheck(
        folder.name,
        channels,
        subsets,
        _parts(folder.name, subsets, test),
        {case.name: case.subset(len(channels)) for case in test},
        checks,
        sites,
        associations_of(checks, subsets, channels, sites, ignore_label),
        findings,
        (),
        _is_planned(folder.name),
        read_groups(folder, PATIENTS_FILE),
        description.get("numTraining"),
        "dataset" not in description,
    )
    result = dataclasses.replace(result, proposals=tuple(_proposals(result)))
    if request.output is not None:
        request.output.mkdir(parents=True, exist_ok=True)
        write_json(request.output / "check.json", result.as_dict())
        save(draw(result), request.output / "check.png", dpi=130)
    return result


def draw(check: DatasetCheck) -> Any:
    """Return the page of figures."""
    return cohort_page(
        check.dataset,
        check.channels,
        list(check.subsets.values()),
        {part: (len(names), check.count(part)) for part, names in check.splits.items()},
        {
            name: {case.name: case.channels[c].high for case in check.cases if c in case.channels}
            for c, name in enumerate(check.channels)
        },
        {case.name: sum(case.label_ml.values()) for case in check.cases if case.label_ml},
        list(check.subsets),
        [f"{case}: {text}" for case, texts in check.findings.items() for text in texts],
    )


# --- parts of the data ------------------------------------------------------------------------------------------------
def _parts(dataset: str, subsets: Mapping[str, Subset], test: Sequence[RawCase]) -> dict[str, tuple[str, ...]]:
    parts: dict[str, tuple[str, ...]] = {"training": tuple(subsets)}
    root = os.environ.get(PREPROCESSED)
    folds = read_splits(Path(root).expanduser() / dataset) if root else None
    for fold, split in enumerate(folds or ()):
        for key, name in (("train", "training"), ("val", "validation")):
            parts[f"fold {fold} {name}"] = tuple(case for case in split[key] if case in subsets)
    if test:
        parts["imagesTs"] = tuple(case.name for case in test)
    return parts


def _has_test_images(folder: Path, description: Mapping[str, Any]) -> bool:
    """Whether ``imagesTs`` holds images, rather than what a file manager leaves everywhere."""
    images = (folder / "imagesTs").glob(f"*{description.get('file_ending', '')}")
    return any(not path.name.startswith(".") for path in images)


def _is_planned(dataset: str) -> bool:
    root = os.environ.get(PREPROCESSED)
    return root is not None and any((Path(root).expanduser() / dataset).glob("*Plans*.json"))


# --- what is strange --------------------------------------------------------------------------------------------------
def _findings(
    checks: Sequence[CaseCheck], channels: Sequence[str], labels: LabelSet | None
) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    if labels is not None:
        known = labels.known_labels | ({labels.ignore_label} if labels.ignore_label is not None else set())
        for check in checks:
            strange = sorted(set(check.label_ml or ()) - known)
            if strange:
                found[check.name].append(
                    f"the label map has the value {', '.join(map(str, strange))}, but dataset.json knows only "
                    f"{', '.join(map(str, sorted(known)))}; mgml convert numbers any values anew (--labels)"
                )
    for check in checks:
        found[check.name] += [
            f"{channels[c]} has one value everywhere and counts as absent" for c in check.placeholders
        ] + check.findings
    by_digest: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for check in checks:
        for c, channel in check.channels.items():
            by_digest[channel.digest].append((check.name, c))
    for owners in by_digest.values():
        for name, c in owners[1:]:
            first, other = owners[0]
            if name != first:
                found[name].append(f"{channels[c]} is the same volume as {channels[other]} of {first}")
    unusual: dict[str, list[str]] = defaultdict(list)
    for c, name in enumerate(channels):
        there = [check for check in checks if c in check.channels]
        medians = outlying([check.channels[c].median for check in there])
        brightest = outlying([check.channels[c].high for check in there])
        for check, *distances in zip(there, medians, brightest, strict=True):
            largest = max(distances, key=abs)
            if abs(largest) > OUTLIER:
                unusual[check.name].append(f"{name} {largest:+.0f}")
    for case, texts in unusual.items():
        found[case].append(f"unusual intensities, in robust standard deviations from the median: {', '.join(texts)}")
    return {name: tuple(texts) for name, texts in found.items() if texts}


def _labels_alone(folder: Path, description: Mapping[str, Any], cases: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return a finding for every label map of ``labelsTr`` whose case has no image in ``imagesTr``."""
    if "dataset" in description:  # files are listed one by one, wherever they lie
        return {}
    ending = file_ending(dict(description))
    names = sorted(file.name[: -len(ending)] for file in (folder / "labelsTr").glob(f"*{ending}"))
    lonely = (name for name in names if name not in cases and not name.startswith("."))
    return {name: ("has a label map in labelsTr, but no image in imagesTr: nobody trains on it",) for name in lonely}


def outlying(values: Sequence[float]) -> NDArray[np.float64]:
    """Return how far each value is from the median, in robust standard deviations; zeros for fewer than eight values.

    Values that are all above 0 are compared by their logarithms, as MR intensities have no unit.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < FEWEST_FOR_OUTLIERS:
        return np.zeros(len(array))
    if np.all(array > 0):
        array = np.log(array)
    distance = array - np.median(array)
    scale = 1.4826 * float(np.median(np.abs(distance)))
    return distance / scale if scale > 0 else np.zeros(len(array))


# --- what to do -------------------------------------------------------------------------------------------------------
def _proposals(check: DatasetCheck) -> Iterable[Proposal]:
    dataset = check.dataset_id
    if check.num_training is not None and check.num_training != len(check.subsets):
        yield Proposal(
            f"dataset.json says numTraining {check.num_training}, but there are {len(check.subsets)} training cases, "
            f"so nnU-Net refuses the data set: add what is missing, or correct the number"
        )
    if check.placeholders:
        yield Proposal(
            f"{len(check.placeholders)} case(s) have placeholder volumes that are not recorded: nnU-Net's fingerprint "
            f"would take them for data",
            f"mgml convert raw -d {dataset}",
        )
    counts, total = check.count("training"), len(check.subsets)
    never = [name for name, count in counts.items() if not count]
    if never:
        yield Proposal(
            f"no training case has {', '.join(never)}, so nothing can be learned of it: convert again without it "
            f"(fewer --modalities)"
        )
    if min(counts.values()) < total and not never:
        yield Proposal(
            "if the patients to come lack the same as often as these, let training hide nothing on top of it (default: "
            "every subset of what a case has, alike); the terms that compare with the complete view are off then",
            _plan(dataset, "mask_sampling=fixed"),
        )
        if max(counts.values()) > UNEVEN * min(counts.values()):
            yield Proposal(
                f"{max(counts, key=counts.__getitem__)} is there far more often than "
                f"{min(counts, key=counts.__getitem__)}: compare the default with PASSION's rebalancing",
                _plan(dataset, "rebalancing=passion", "mask_sampling=fixed"),
            )
    absent = {
        part: [name for name, count in check.count(part).items() if not count and counts[name]]
        for part in check.splits
        if part.startswith("fold")
    }
    if any(absent.values()):
        said = "; ".join(f"{part} has no case with {', '.join(names)}" for part, names in absent.items() if names)
        seed = _good_seed(check)
        if not check.in_folders:
            yield Proposal(f"{said}: write a splits_final.json in which both parts have everything")
        elif seed is None:
            yield Proposal(f"{said}: too few cases for a random split to have it in every part")
        else:
            yield Proposal(
                f"{said}; in this random split (one, fold 0) both parts have everything",
                f"mgml convert split -d {dataset} --split {_RATIO} --seed {seed} --overwrite",
            )


def _good_seed(check: DatasetCheck, most: int = 100) -> int | None:
    """Return a seed by which training and validation both have cases with each modality there is; None: none found."""
    wanted = [c for c, name in enumerate(check.channels) if check.count("training")[name]]
    for seed in range(most):
        try:
            split = random_split(check.subsets, parse_ratio(_RATIO), seed, check.patients)
        except ValueError:  # fewer patients than parts
            return None
        if all(any(check.subsets[case][c] for case in part) for part in (split.train, split.val) for c in wanted):
            return seed
    return None


def _plan(dataset: str, *options: str) -> str:
    return shlex.join(["mgml", "plan", "-d", dataset, "--set", *options])
