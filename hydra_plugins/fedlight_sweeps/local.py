"""Runs the cells of a sweep as parallel processes on this machine, each on one GPU if there are any."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.types import TaskFunction
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from omegaconf import DictConfig

from fedlight.runtime.errors import BadInput, CellFailed
from fedlight.runtime.machine import CORES

VISIBLE = "CUDA_VISIBLE_DEVICES"
WORKERS = "FEDLIGHT_WORKERS"  # a cell's default number of workers, see configs/trainer


class LocalLauncher(JoblibLauncher):
    """Hydra's joblib launcher; `n_jobs=null` starts a process for each GPU, or each core without GPUs."""

    task_function: TaskFunction | None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs all cells, even if some fail."""
        with TemporaryDirectory() as folder:
            self.joblib["n_jobs"] = self.divide_machine(folder, len(job_overrides))
            try:
                return super().launch(job_overrides, initial_job_idx)
            except BrokenProcessPool:
                raise _explain_kill() from None

    def divide_machine(self, folder: str, cells: int) -> int:
        """Gives each process a GPU, or its share of the cores; returns the number of processes, as joblib's.

        Args:
            folder: for the files by which processes take a GPU.
            cells: maximum number of cells at once.

        Raises:
            BadInput: `hydra.launcher.n_jobs` is no number of processes.
        """
        assert self.config is not None
        assert self.task_function is not None
        given = self.joblib["n_jobs"]
        if given is not None and (type(given) is not int or given == 0):
            raise BadInput(f"hydra.launcher.n_jobs must be null or a number of processes, got {given!r}")
        gpus = [] if self.config.trainer.accelerator == "cpu" else _gpus()
        processes: int = given or len(gpus) or -1
        if gpus:
            places = gpus * max(processes, os.cpu_count() or 1)
            self.task_function = OnOneGPU(self.task_function, tuple(places), folder)
        else:  # the processes share the cores
            at_once = min(processes if processes > 0 else CORES, cells)
            os.environ.setdefault(WORKERS, str(max(1, CORES // at_once)))
        return processes

    def open_pool(self, most: int) -> "LocalPool":
        """A pool of as many processes as `launch` starts for so many cells."""
        return LocalPool(self, most)


class LocalPool:
    """Runs cells in processes of this machine, each as soon as a process is free; see `CellPool`."""

    def __init__(self, launcher: LocalLauncher, most: int) -> None:
        from loky import ProcessPoolExecutor

        self._launcher = launcher
        self._folder = TemporaryDirectory()
        processes = launcher.divide_machine(self._folder.name, most)
        self.size = min(processes if processes > 0 else CORES, most)
        self._executor = ProcessPoolExecutor(self.size)
        self._running: dict[Future[JobReturn], list[str]] = {}

    def start(self, cells: Sequence[list[str]], first: int) -> None:
        from hydra_plugins.hydra_joblib_launcher._core import execute_job

        launcher = self._launcher
        assert launcher.config is not None
        Path(launcher.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        state = Singleton.get_state()
        for number, cell in enumerate(cells, first):
            job = (number, cell, launcher.hydra_context, launcher.config, launcher.task_function, state)
            self._running[self._executor.submit(execute_job, *job)] = cell

    def wait(self) -> list[list[str]]:
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        cells = []
        for future in ended:
            cells.append(self._running.pop(future))
            try:
                with suppress(CellFailed):  # it was printed, and the cell's folder tells
                    _ = future.result().return_value
            except BrokenProcessPool:
                raise _explain_kill() from None
        return cells

    def close(self) -> None:
        self._executor.shutdown(kill_workers=bool(self._running))
        self._folder.cleanup()


def _explain_kill() -> CellFailed:
    """Prints that a process was killed; the error that ends the command."""
    message = "the process of a cell was killed, perhaps for its memory; type the command again"
    print(f"fedlight: error: {message}", file=sys.stderr)
    return CellFailed(1)


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
