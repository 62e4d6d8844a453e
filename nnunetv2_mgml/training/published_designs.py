"""Trainers named after the published methods: their fusion design alone, and with MGML on top (``_MGML``).

``nnUNetTrainerX`` is `nnUNetTrainerMGML_baseline`, and ``nnUNetTrainerX_MGML`` is `nnUNetTrainerMGML`, on plans written
with ``mgml plan --set fusion=...`` and the design's ``published_options`` (docs/fusion.md). All other options are the
plans' own. ``fusion_options`` of the plans count where they were set for the same design, and win over the published
ones; those of another design are dropped, which the log says. ``_MGML`` includes our loss on the complete view; the
paper's terms alone are ``complete_view_weight=0`` in the plans.

One framework, preprocessing, encoder and decoder, so that only the fusion (and MGML) differs: these are the designs
inside our network, not the authors' code.
"""

# ruff: noqa: N801  nnU-Net's naming scheme: the class name is the argument of -tr

from __future__ import annotations

from typing import Any

from nnunetv2_mgml.network.fusion import find_design
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML
from nnunetv2_mgml.training.variants import nnUNetTrainerMGML_baseline

_BASELINE = nnUNetTrainerMGML_baseline.config_overrides


def _options(design: str, alone: bool) -> dict[str, Any]:
    """Return what a trainer of a design fixes: its published parts, and without MGML also what that leaves out."""
    cls = find_design(design)
    return {
        "fusion": design,
        **(_BASELINE if alone else {}),
        **cls.published_options,
        **(cls.published_alone if alone else {}),
    }


class nnUNetTrainerRFNet(nnUNetTrainerMGML):
    """Region-aware fusion at every scale (Ding et al., ICCV 2021)."""

    config_overrides = _options("region_aware", alone=True)


class nnUNetTrainerRFNet_MGML(nnUNetTrainerMGML):
    """Region-aware fusion at every scale with MGML."""

    config_overrides = _options("region_aware", alone=False)


class nnUNetTrainermmFormer(nnUNetTrainerMGML):
    """Intra- and inter-modal transformers (Zhang et al., MICCAI 2022)."""

    config_overrides = _options("mmformer", alone=True)


class nnUNetTrainermmFormer_MGML(nnUNetTrainerMGML):
    """Intra- and inter-modal transformers with MGML."""

    config_overrides = _options("mmformer", alone=False)


class nnUNetTrainerIMFuse(nnUNetTrainerMGML):
    """Interleaved Mamba fusion (Pipoli et al., MICCAI 2025)."""

    config_overrides = _options("imfuse", alone=True)


class nnUNetTrainerIMFuse_MGML(nnUNetTrainerMGML):
    """Interleaved Mamba fusion with MGML."""

    config_overrides = _options("imfuse", alone=False)


class nnUNetTrainerHeMIS(nnUNetTrainerMGML):
    """Mean and variance over the modalities (Havaei et al., MICCAI 2016)."""

    config_overrides = _options("hemis", alone=True)


class nnUNetTrainerHeMIS_MGML(nnUNetTrainerMGML):
    """Mean and variance over the modalities with MGML."""

    config_overrides = _options("hemis", alone=False)


class nnUNetTrainerUHVED(nnUNetTrainerMGML):
    """Product of Gaussians (Dorent et al., MICCAI 2019); reconstruction only where the plans ask for it."""

    config_overrides = _options("uhved", alone=True)


class nnUNetTrainerUHVED_MGML(nnUNetTrainerMGML):
    """Product of Gaussians with MGML."""

    config_overrides = _options("uhved", alone=False)


class nnUNetTrainerUNetMFI(nnUNetTrainerMGML):
    """Modality-adaptive feature interaction (Zhao et al., MICCAI 2022)."""

    config_overrides = _options("mfi", alone=True)


class nnUNetTrainerUNetMFI_MGML(nnUNetTrainerMGML):
    """Modality-adaptive feature interaction with MGML."""

    config_overrides = _options("mfi", alone=False)


class nnUNetTrainerM2FTrans(nnUNetTrainerMGML):
    """Masked fusion tokens (Shi et al., IEEE JBHI 2024)."""

    config_overrides = _options("m2ftrans", alone=True)


class nnUNetTrainerM2FTrans_MGML(nnUNetTrainerMGML):
    """Masked fusion tokens with MGML."""

    config_overrides = _options("m2ftrans", alone=False)


class nnUNetTrainerSFusion(nnUNetTrainerMGML):
    """Self-attention over the available modalities (SFusion, Liu et al., MICCAI 2023)."""

    config_overrides = _options("sfusion", alone=True)


class nnUNetTrainerSFusion_MGML(nnUNetTrainerMGML):
    """Self-attention over the available modalities with MGML."""

    config_overrides = _options("sfusion", alone=False)


class nnUNetTrainerDeMoSeg(nnUNetTrainerMGML):
    """Decoupled first block in an early-fusion network (DeMoSeg, 2026)."""

    config_overrides = _options("demoseg", alone=True)


class nnUNetTrainerDeMoSeg_MGML(nnUNetTrainerMGML):
    """Decoupled first block in an early-fusion network with MGML."""

    config_overrides = _options("demoseg", alone=False)
