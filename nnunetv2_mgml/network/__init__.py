"""One encoder per modality, a fusion design, a fusion decoder and a decoder shared by all modalities."""
