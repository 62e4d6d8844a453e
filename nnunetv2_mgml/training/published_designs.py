"""Trainers named after the published methods: their fusion design alone, and with MGML on top (``_MGML``).

``nnUNetTrainerX`` is `nnUNetTrainerMGML_baseline`, and ``nnUNetTrainerX_MGML`` is `nnUNetTrainerMGML`, on plans written
with ``mgml plan --set fusion=...`` (for RFNet also ``fusion_options={"full_resolution_regions": true}``). All other
options are the plans' own. ``fusion_options`` of the plans count where they were set for the same design, and win over
RFNet's; those of another design are dropped, which the log says. ``_MGML`` includes our loss on the complete view; the
paper's terms alone are ``complete_view_weight=0`` in the plans.

One framework, preprocessing, encoder and decoder, so that only the fusion (and MGML) differs: these are the designs
inside our network, not the authors' code.
"""

# ruff: noqa: N801  nnU-Net's naming scheme: the class name is the argument of -tr

from __future__ import annotations

from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML
from nnunetv2_mgml.training.variants import nnUNetTrainerMGML_baseline

_BASELINE = nnUNetTrainerMGML_baseline.config_overrides
_RFNET = {"fusion": "region_aware", "fusion_options": {"full_resolution_regions": True}}


class nnUNetTrainerRFNet(nnUNetTrainerMGML):
    """Region-aware fusion at every scale (Ding et al., ICCV 2021)."""

    config_overrides = {**_RFNET, **_BASELINE}


class nnUNetTrainerRFNet_MGML(nnUNetTrainerMGML):
    """Region-aware fusion at every scale with MGML."""

    config_overrides = _RFNET


class nnUNetTrainermmFormer(nnUNetTrainerMGML):
    """Intra- and inter-modal transformers (Zhang et al., MICCAI 2022)."""

    config_overrides = {"fusion": "mmformer", **_BASELINE}


class nnUNetTrainermmFormer_MGML(nnUNetTrainerMGML):
    """Intra- and inter-modal transformers with MGML."""

    config_overrides = {"fusion": "mmformer"}


class nnUNetTrainerIMFuse(nnUNetTrainerMGML):
    """Interleaved Mamba fusion (Pipoli et al., MICCAI 2025)."""

    config_overrides = {"fusion": "imfuse", **_BASELINE}


class nnUNetTrainerIMFuse_MGML(nnUNetTrainerMGML):
    """Interleaved Mamba fusion with MGML."""

    config_overrides = {"fusion": "imfuse"}


class nnUNetTrainerHeMIS(nnUNetTrainerMGML):
    """Mean and variance over the modalities (Havaei et al., MICCAI 2016)."""

    config_overrides = {"fusion": "hemis", **_BASELINE}


class nnUNetTrainerHeMIS_MGML(nnUNetTrainerMGML):
    """Mean and variance over the modalities with MGML."""

    config_overrides = {"fusion": "hemis"}


class nnUNetTrainerUHVED(nnUNetTrainerMGML):
    """Product of Gaussians (Dorent et al., MICCAI 2019); reconstruction only where the plans ask for it."""

    config_overrides = {"fusion": "uhved", **_BASELINE}


class nnUNetTrainerUHVED_MGML(nnUNetTrainerMGML):
    """Product of Gaussians with MGML."""

    config_overrides = {"fusion": "uhved"}


class nnUNetTrainerUNetMFI(nnUNetTrainerMGML):
    """Modality-adaptive feature interaction (Zhao et al., MICCAI 2022)."""

    config_overrides = {"fusion": "mfi", **_BASELINE}


class nnUNetTrainerUNetMFI_MGML(nnUNetTrainerMGML):
    """Modality-adaptive feature interaction with MGML."""

    config_overrides = {"fusion": "mfi"}


class nnUNetTrainerM2FTrans(nnUNetTrainerMGML):
    """Masked fusion tokens (Shi et al., IEEE JBHI 2024)."""

    config_overrides = {"fusion": "m2ftrans", **_BASELINE}


class nnUNetTrainerM2FTrans_MGML(nnUNetTrainerMGML):
    """Masked fusion tokens with MGML."""

    config_overrides = {"fusion": "m2ftrans"}


class nnUNetTrainerSFusion(nnUNetTrainerMGML):
    """Self-attention over the available modalities (SFusion, Liu et al., MICCAI 2023)."""

    config_overrides = {"fusion": "sfusion", **_BASELINE}


class nnUNetTrainerSFusion_MGML(nnUNetTrainerMGML):
    """Self-attention over the available modalities with MGML."""

    config_overrides = {"fusion": "sfusion"}
