"""Runs a console script on one core: ``python one_thread.py nnUNetv2_train ...``.

nnU-Net on a CPU takes as many threads as the machine has cores. Several trainings side by side then slow each other
down, so here the machine is said to have one.
"""

import importlib.metadata
import multiprocessing
import os
import sys

if __name__ == "__main__":  # not in the worker processes a script may start
    os.cpu_count = multiprocessing.cpu_count = lambda: 1
    sys.argv = sys.argv[1:]
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(script.load()())
