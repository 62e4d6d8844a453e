"""Every place where nnU-Net is bent, one file each."""
