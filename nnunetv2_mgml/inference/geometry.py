"""What nnU-Net's writers need of a case's properties to write a label map where its image lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_mgml.inference.inputs import CaseError

NEEDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "SimpleITKIO": ("sitk_stuff", ("spacing", "origin", "direction")),
    "SimpleITKIOWithReorient": ("sitk_stuff", ("spacing", "origin", "direction", "original_orientation")),
    "NibabelIO": ("nibabel_stuff", ("original_affine",)),
    "NibabelIOWithReorient": ("nibabel_stuff", ("original_affine", "reoriented_affine")),
}
"""Class of nnU-Net's reader and writer -> the entry of the properties its ``write_seg`` reads, and what that must hold.

Those of pictures and TIFF need no more than ``spacing`` (tests/inference/test_inference_arrays.py asks every class).
"""


def check_writable(name: str, properties: Mapping[str, Any], writer: type) -> None:
    """Raise unless properties hold what a writer needs; it would say so only after the prediction.

    Args:
        name: case name, for the message.
        properties: nnU-Net's image properties.
        writer: the reader and writer of the model's plans; of a class nobody knows nothing is asked.

    Raises:
        CaseError: something is missing.
    """
    known = next((parent.__name__ for parent in writer.__mro__ if parent.__name__ in NEEDED), None)
    if known is None:
        return
    entry, keys = NEEDED[known]
    found = properties.get(entry)
    missing = [key for key in keys if not isinstance(found, Mapping) or key not in found]
    if missing:
        raise CaseError(
            f"Case {name}: to write a file its properties need, beside the spacing, the image's place: {entry} with "
            f"{', '.join(missing)}. Give those of nnU-Net's reader, {writer.__name__}().read_images([FILE])[1], or "
            f"no output file, and the label map is returned."
        )
