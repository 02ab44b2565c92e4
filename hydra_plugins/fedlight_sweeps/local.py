"""Runs the cells of a sweep as parallel processes on this machine, each on one GPU if there are any."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn
from hydra.types import TaskFunction
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from omegaconf import DictConfig

from fedlight.runtime.errors import CellFailed
from fedlight.runtime.machine import CORES

VISIBLE = "CUDA_VISIBLE_DEVICES"
WORKERS = "FEDLIGHT_WORKERS"  # a cell's default number of workers, see configs/trainer


class LocalLauncher(JoblibLauncher):
    """Hydra's joblib launcher; `n_jobs=null` starts a process for each GPU, or each core without GPUs."""

    task_function: TaskFunction | None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs all cells, even if some fail."""
        assert self.config is not None
        assert self.task_function is not None
        gpus = [] if self.config.trainer.accelerator == "cpu" else _gpus()
        processes = self.joblib["n_jobs"] = self.joblib["n_jobs"] or len(gpus) or -1
        at_once = min(processes if processes > 0 else CORES, len(job_overrides))
        if not gpus:  # the processes share the cores
            os.environ.setdefault(WORKERS, str(max(1, CORES // at_once)))
        with TemporaryDirectory() as folder:
            if gpus:
                places = gpus * max(processes, os.cpu_count() or 1)
                self.task_function = OnOneGPU(self.task_function, tuple(places), folder)
            try:
                return super().launch(job_overrides, initial_job_idx)
            except BrokenProcessPool:
                message = "the process of a cell was killed, perhaps for its memory; type the command again"
                print(f"fedlight: error: {message}", file=sys.stderr)
                raise CellFailed(1) from None


@dataclass(frozen=True)
class OnOneGPU:
    """Runs a cell in a process that sees one GPU.

    Attributes:
        task: runs the cell.
        places: the GPU of each process.
        folder: of the lock files by which processes take a place.
    """

    task: TaskFunction
    places: tuple[str, ...]
    folder: str

    def __call__(self, config: DictConfig) -> Any:
        os.environ[VISIBLE], _ = _take_place(self.places, self.folder)
        return self.task(config)


@cache
def _take_place(places: tuple[str, ...], folder: str) -> tuple[str, FileLock]:
    """The first free GPU, and the lock that reserves it until this process ends."""
    for number, gpu in enumerate(places):
        lock = FileLock(Path(folder, str(number)))
        with suppress(Timeout):
            lock.acquire(timeout=0)
            return gpu, lock
    raise AssertionError("more processes than places")


def _gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get(VISIBLE)) is not None:
        return [gpu for gpu in visible.split(",") if gpu and gpu != "-1"]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]
