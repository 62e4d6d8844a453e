"""The dataset folder as a whole: may it be written, built beside its place, then renamed in one step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mgml.dataset_conversion.labels import dataset_labels, plain_labels
from nnunetv2_mgml.io.files import only_writer, replacing_folder, write_json
from nnunetv2_mgml.modalities import BRATS_CHANNELS
from nnunetv2_mgml.plans.cohort import MISSING_FILE
from nnunetv2_mgml.plans.folders import names_in_use
from nnunetv2_mgml.plans.regions import check_regions

FILE_ENDING = ".nii.gz"


def check_target(source: Path, target: Path, dataset_id: int, overwrite: bool) -> None:
    """Make sure that a dataset may be written.

    Args:
        source: folder the data come from.
        target: ``nnUNet_raw/DatasetXXX_NAME``.
        dataset_id: its id.
        overwrite: whether ``target`` may be replaced.

    Raises:
        ValueError: the id belongs to another name, the target exists, or one folder lies within the other.
    """
    for used, folder in names_in_use(dataset_id).items():
        if used != target.name:
            raise ValueError(
                f"Dataset id {dataset_id} is taken by {used} in {folder}; nnU-Net wants one name per id. "
                f"Choose another id, or give --name {used.split('_', 1)[-1]} --overwrite to replace it."
            )
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists. Give --overwrite to replace it, or choose another id.")
    real_source, real_target = source.resolve(), target.resolve()
    if real_target == real_source or real_target in real_source.parents or real_source in real_target.parents:
        raise ValueError(
            f"The source {source} and the new dataset {target} lie within each other; move the source elsewhere."
        )


def refuse_files_inside(target: Path, files: Iterable[Path]) -> None:
    """Raise a ValueError where a file to convert lies, itself or by links, in the folder that will be replaced.

    Args:
        target: folder that will be written, and replaced if it exists.
        files: images and label maps of all cases, those of bad ones included.
    """
    folder = target.resolve()
    inside = [
        file
        for file in files
        if folder in file.resolve().parents or folder in (file.parent.resolve() / file.name).parents
    ]
    if inside:
        raise ValueError(
            f"{len(inside)} file(s) to convert lie in {target}, which would be replaced, such as {inside[0]}; they "
            f"would be lost. Write to another folder (a data set: to another id), or move them elsewhere."
        )


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """Give a temporary sibling folder with nnU-Net's sub-folders, which becomes ``target`` at the end.

    An exception (also Ctrl-C) removes it and leaves ``target`` as it was.

    Raises:
        ValueError: another process is building a data set of this id at the moment.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # two names for one id would both pass the check of the target, so that the id is what is taken
    dataset_id, _, _ = target.name.partition("_")
    with only_writer(target.with_name(dataset_id)), replacing_folder(target) as temporary:
        for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (temporary / folder).mkdir()
        yield temporary
        for folder in ("imagesTs", "labelsTs"):
            if not any((temporary / folder).iterdir()):
                (temporary / folder).rmdir()


def write_description(
    folder: Path,
    name: str,
    origin: str,
    num_training: int,
    with_cavity: bool,
    missing: Mapping[str, Sequence[str]],
    channels: Sequence[str] = BRATS_CHANNELS,
    plain: bool = False,
) -> None:
    """Write ``dataset.json`` and, if a case lacks a sequence, ``missing_modalities.json``.

    Args:
        folder: dataset folder.
        name: ``DatasetXXX_NAME``.
        origin: where the data come from, for the description.
        num_training: number of cases in ``imagesTr``.
        with_cavity: whether there are resection cavities.
        missing: case -> absent modalities.
        channels: canonical modality names in channel order.
        plain: labels that exclude one another instead of regions.
    """
    labels, order = dataset_labels(with_cavity)
    content: dict[str, Any] = {
        # Dataset137_BraTS21 spells them T1, T1ce, T2, Flair.
        "channel_names": {str(i): channel.capitalize() for i, channel in enumerate(channels)},
        **({"labels": plain_labels(with_cavity)} if plain else {"labels": labels, "regions_class_order": order}),
        "numTraining": num_training,
        "file_ending": FILE_ENDING,
        "name": name,
        "description": f"Converted by mgml convert brats from {origin}",
    }
    check_regions(content)
    write_json(folder / "dataset.json", content)
    if missing:
        write_json(folder / MISSING_FILE, missing)
