"""Encoders (one for all modalities, or one each), a fusion design, its decoder and one shared by all modalities."""
