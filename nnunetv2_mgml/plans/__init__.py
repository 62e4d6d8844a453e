"""nnU-Net's plans and folders, and the options of ours that they carry."""
