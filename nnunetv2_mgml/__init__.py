"""nnunetv2_mgml: an nnU-Net v2 plugin for segmentation when imaging modalities are missing.

Importing the package imports neither torch nor nnU-Net.
"""

__version__ = "0.1.0"
