"""Whether a file is whole (imports neither torch nor nnU-Net, so that scoring can ask as well)."""

from __future__ import annotations

import gzip
import math
import os

_CHUNK = 1 << 22


class TruncatedError(EOFError):
    """A file holds fewer bytes than its header says."""


def check_complete(path: str) -> None:
    """Raise an exception if a NIfTI file holds fewer bytes than its header says; other formats are left to the reader.

    SimpleITK reads a truncated NIfTI file without complaint and fills the rest with zeros.

    Raises:
        TruncatedError: the file ends early.
        EOFError: so does its compressed stream.
        Exception: whatever nibabel or gzip raise on a damaged file.
    """
    name = path.lower()
    if not name.endswith((".nii", ".nii.gz")):
        return
    import nibabel  # only these files need it

    image = nibabel.load(path)
    expected = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    size = os.path.getsize(path)
    if name.endswith(".gz"):
        with gzip.open(path) as stream:  # to its end, so that the checksum is compared as well
            size = sum(len(chunk) for chunk in iter(lambda: stream.read(_CHUNK), b""))
    if size < expected:
        raise TruncatedError(f"truncated: {size} of {expected} bytes")
