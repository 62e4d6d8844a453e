"""Runs a console script on one core: ``python one_thread.py [--skip_validation] nnUNetv2_train ...``.

nnU-Net on a CPU takes as many threads as the machine has cores. Several trainings side by side then slow each other
down, so here the machine is said to have one. ``--skip_validation`` leaves out nnU-Net's final validation, which
mirrors eight times over and on real cases takes longer than the training; `mgml evaluate` follows anyway.
"""

import importlib.metadata
import multiprocessing
import os
import sys

if __name__ == "__main__":  # not in the worker processes a script may start
    os.cpu_count = multiprocessing.cpu_count = lambda: 1
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "--skip_validation":
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        from nnunetv2_mgml.training import nnUNetTrainerMGML

        sys.argv = sys.argv[1:]
        for trainer in (nnUNetTrainer, nnUNetTrainerMGML):  # whoever defines it; other trainers inherit
            trainer.perform_actual_validation = lambda *_, **__: None
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(script.load()())
