"""Finds the cases of a data set of the Medical Segmentation Decathlon: all modalities of a case in one 4-D file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.case_files import CaseFiles, FoundCases, nifti_stem
from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.modalities import canonical_name


def find_decathlon(source: Path) -> tuple[FoundCases, dict[str, int]]:
    """Find the cases of ``imagesTr``, ``labelsTr`` and ``imagesTs``.

    Args:
        source: folder with ``dataset.json``, as published.

    Returns:
        The cases, whose ``frames`` say which volume of the file a modality is, and label name -> value.

    Raises:
        FileNotFoundError: there is no ``dataset.json``, or no image.
        ValueError: ``dataset.json`` names fewer than two modalities, two of one name, or has another form.
    """
    content = read_json(source / "dataset.json")
    modality = content.get("modality") if isinstance(content, dict) else None
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(modality, dict) or not isinstance(labels, dict) or len(modality) < 2:
        raise ValueError(f"{source / 'dataset.json'} must name two modalities or more ('modality') and 'labels'.")
    frames = _frames(source, modality)
    values = _label_values(source, labels)
    found = FoundCases(tuple(frames), origin=str(source))
    for part in ("imagesTr", "imagesTs"):
        for path in sorted((source / part).glob("*.nii*")):
            stem = nifti_stem(path.name)
            if stem is None or stem.startswith("."):
                continue
            label = source / part.replace("images", "labels") / path.name
            found.cases.append(
                CaseFiles(stem, dict.fromkeys(frames, path), label if label.is_file() else None, frames=frames)
            )
    if not found.cases:
        raise FileNotFoundError(f"{source / 'imagesTr'} holds no NIfTI file.")
    found.cases.sort(key=lambda case: case.name)
    return found, values


def _frames(source: Path, modality: dict[str, Any]) -> dict[str, int]:
    """Return modality name -> index along the fourth axis."""
    if set(modality) != set(map(str, range(len(modality)))):
        raise ValueError(
            f"{source / 'dataset.json'} must number its modalities 0 to {len(modality) - 1}, in the order of the "
            f"volumes; found {', '.join(modality)}."
        )
    frames = {str(modality[str(index)]): index for index in range(len(modality))}
    if len(set(map(canonical_name, frames))) < len(modality):
        raise ValueError(
            f"{source / 'dataset.json'} must give each modality a name of its own; found "
            f"{', '.join(str(name) for name in modality.values())}."
        )
    return frames


def _label_values(source: Path, labels: dict[str, Any]) -> dict[str, int]:
    """Return label name -> value, without the background."""
    if not all(value.isdecimal() for value in labels) or len(set(map(str, labels.values()))) < len(labels):
        raise ValueError(
            f'{source / "dataset.json"} must map each label value to a name of its own, {{"0": "background", "1": '
            f'"edema"}}; found {json.dumps(labels)[:80]}.'
        )
    return {str(name): int(value) for value, name in labels.items() if int(value) != 0}
