"""Conversion of BraTS folders to nnU-Net raw datasets, of predictions back to BraTS, and fixed data splits."""
