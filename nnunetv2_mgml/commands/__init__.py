"""The `mgml` commands: the only home of argparse and print."""

TRAINER = "nnUNetTrainerMGML"
"""Of commands that are given none with ``-tr``."""
