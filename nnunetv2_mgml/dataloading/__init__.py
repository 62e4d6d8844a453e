"""nnU-Net's loader plus a modality mask per sample."""
