"""The processor cores that this process may use: fewer than the machine has in a job of SLURM."""

import os

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
