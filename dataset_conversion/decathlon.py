"""Finds the cases of a data set of the Medical Segmentation Decathlon: all modalities of a case in one 4-D file."""

from __future__ import annotations

from pathlib import Path

from nnunetv2_mgml.io.case_files import CaseFiles, FoundCases, nifti_stem
from nnunetv2_mgml.io.files import read_json


def find_decathlon(source: Path) -> tuple[FoundCases, dict[str, int]]:
    """Find the cases of ``imagesTr``, ``labelsTr`` and ``imagesTs``.

    Args:
        source: folder with ``dataset.json``, as published.

    Returns:
        The cases, whose ``frames`` say which volume of the file a modality is, and label name -> value.

    Raises:
        FileNotFoundError: there is no ``dataset.json``, or no image.
        ValueError: ``dataset.json`` names fewer than two modalities or has another form.
    """
    content = read_json(source / "dataset.json")
    modality = content.get("modality") if isinstance(content, dict) else None
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(modality, dict) or not isinstance(labels, dict) or len(modality) < 2:
        raise ValueError(f"{source / 'dataset.json'} must name two modalities or more ('modality') and 'labels'.")
    frames = {str(modality[key]): int(key) for key in sorted(modality, key=int)}
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
    return found, {str(name): int(value) for value, name in labels.items() if int(value) != 0}
