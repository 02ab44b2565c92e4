"""Runs the cells of a sweep as SLURM job arrays, as few as the cluster allows."""

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import OmegaConf

from fedlight.runs.beginnings import order_by_rounds
from fedlight.runs.identity import is_done, print_done
from fedlight.runs.plan import PlannedCell, read_launch
from fedlight.runs.status import DONE, read_cell
from fedlight.runtime.errors import BadInput, CellFailed
from fedlight.runtime.slurm_jobs import is_available, job_states, max_array_size

POLL = 5.0  # seconds between two queries of the queue
OF_SWEEPS = ("hydra.mode", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")
"""Overrides that a single cell does not take."""
SHARED = ("name", "timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "nodes", "tasks_per_node")
"""Parameters that submitit has for every kind of cluster; those of SLURM alone have the prefix `slurm_`."""


@dataclass(frozen=True)
class CellJob:
    """Runs `python -m fedlight.run ARGUMENTS` in the process of a job."""

    arguments: list[str]

    def __call__(self) -> None:
        from fedlight.command import DEBUG
        from fedlight.run import main

        os.environ.pop(DEBUG, None)  # set by the launching process, for itself
        sys.argv = ["fedlight.run", *self.arguments]
        main()

    def checkpoint(self) -> Any:
        """Requeues the cell in the same job; submitit calls it at preemption and time-out."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class SlurmArrayLauncher(SlurmLauncher):
    """Hydra's submitit launcher for cells that can be resumed.

    It submits no cell twice. With `detach` it returns after submission, else it waits for all cells, even if
    some fail. It needs no accounting (sacct): the queue and the cells' folders tell how each cell ended.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits the cells that are neither completed nor queued.

        Raises:
            BadInput: SLURM does not answer, or rejects an array; earlier arrays stay submitted.
        """
        assert self.config is not None
        sweep = Path(self.config.hydra.sweep.dir)
        cells = self.submit(job_overrides)
        if self.params["detach"]:
            print(f"python -m fedlight.sweeps status {sweep}    # their states")
            return []
        pool = SlurmPool(self, len(cells), cells)
        ends: list[JobReturn] = []
        while pool.cells:
            ends += [_job_return(cell.overrides, done) for cell, done in pool.wait_for_ends()]
        return ends

    def submit(self, job_overrides: Sequence[Sequence[str]]) -> dict[str, PlannedCell]:
        """Submits the cells that are neither completed nor queued; returns all of them with their jobs.

        Raises:
            BadInput: SLURM does not answer, or rejects an array; earlier arrays stay submitted.
        """
        assert self.config is not None
        sweep = Path(self.config.hydra.sweep.dir)
        plan = read_launch(sweep, sys.argv[1:], str(Path.cwd()))
        assert plan is not None
        planned = {tuple(cell.overrides): name for name, cell in plan.cells.items()}
        cells = [planned[tuple(overrides)] for overrides in job_overrides]

        queue = job_states(job for cell in cells if (job := plan.cells[cell].job))
        if queue is None or not is_available():
            raise BadInput("hydra/launcher=slurm: squeue does not answer; is this a login node of SLURM?")
        new, queued = [], []
        for cell in cells:
            if plan.cells[cell].job in queue:
                print(f"{cell}: with SLURM already, as job {plan.cells[cell].job}")
                queued.append(cell)
            elif is_done(sweep / cell):  # its job has ended since the grid was checked
                print_done(sweep / cell)
            else:
                new.append(cell)
        shorter: list[str] = []  # jobs of cells that those of the next group go on from
        for group in order_by_rounds({cell: plan.cells[cell].config for cell in [*queued, *new]}):
            for array in split_into_arrays([cell for cell in group if cell in new], max_array_size()):
                jobs = self._submit(
                    [CellJob([*self._flags(), *plan.cells[cell].overrides]) for cell in array], shorter
                )
                for cell, job in zip(array, jobs, strict=True):
                    plan.cells[cell].job = job
                plan.write(sweep)  # before the next array, which SLURM may reject
                print(f"{len(array)} cells submitted as SLURM job {jobs[0].split('_')[0]}")
            shorter = [str(plan.cells[cell].job) for cell in group]
        return {cell: plan.cells[cell] for cell in cells}

    def open_pool(self, most: int) -> "SlurmPool":
        """A pool of so many jobs, or fewer where `array_parallelism` is smaller."""
        return SlurmPool(self, most, {})

    def _flags(self) -> list[str]:
        """The command's options and overrides for Hydra itself that a single cell needs as well."""
        assert self.config is not None
        sources = self.config.hydra.runtime.config_sources
        typed: Any = OmegaConf.to_container(self.config.hydra.overrides.hydra)  # references stay references
        folders = [source.path for source in sources if source.provider == "command-line"]
        overrides = [override for override in typed if not override.lstrip("+~").startswith(OF_SWEEPS)]
        return [*(flag for folder in folders for flag in ("--config-dir", folder)), *overrides]

    def _submit(self, cells: Sequence[CellJob], after: Sequence[str]) -> list[str]:
        """Submits an array of cells, which start when the jobs `after` have ended; returns its jobs."""
        import submitit

        options = {key: value for key, value in self.params.items() if key != "detach"}
        folder, timeouts = options.pop("submitit_folder"), options.pop("max_num_timeout")
        if cpus := options["cpus_per_task"]:  # srun does not inherit them from sbatch since SLURM 22.05
            options["srun_args"] = [f"--cpus-per-task={cpus}", *options["srun_args"]]
        if options["nodes"] > 1:  # the cell runs on the first node and starts workers on the others
            options["srun_args"] = ["--nodes=1", "--ntasks=1", *options["srun_args"]]
        extra = options.pop("additional_parameters")
        options["additional_parameters"] = {"requeue": True, **extra}
        if after:
            ended = ":".join(dict.fromkeys(job.split("_")[0] for job in after))
            given = [extra["dependency"]] if "dependency" in extra else []
            options["additional_parameters"]["dependency"] = ",".join([*given, f"afterany:{ended}"])
        parameters = {key if key in SHARED else f"slurm_{key}": value for key, value in options.items()}
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
            executor.update_parameters(**parameters)
            return [job.job_id for job in executor.submit_array(cells)]
        except Exception as error:  # submitit has errors of many kinds
            logs = Path(folder).parent
            if not any(path.is_dir() for path in logs.glob("*")):
                shutil.rmtree(logs, ignore_errors=True)
            limit = (
                "; hydra.sweeper.max_batch_size=N submits at most N cells at once" if len(cells) > 1 else ""
            )
            raise BadInput(f"hydra/launcher=slurm: {error}{limit}") from error


class SlurmPool:
    """Runs cells as SLURM jobs; see `CellPool`. The jobs stay with SLURM where the command ends early.

    Attributes:
        size: maximum number of cells at once.
        cells: those that have not ended, by id, with their jobs.
    """

    def __init__(self, launcher: SlurmArrayLauncher, most: int, cells: Mapping[str, PlannedCell]) -> None:
        assert launcher.config is not None
        self._launcher = launcher
        self._sweep = Path(launcher.config.hydra.sweep.dir)
        self.size = min(launcher.params["array_parallelism"], most)
        self.cells = dict(cells)

    def start(self, cells: Sequence[list[str]], first: int) -> None:
        self.cells |= self._launcher.submit(cells)

    def wait(self) -> list[list[str]]:
        return [cell.overrides for cell, _ in self.wait_for_ends()]

    def wait_for_ends(self) -> list[tuple[PlannedCell, bool]]:
        """Waits until jobs have left SLURM's queue; prints the state in which each cell ended.

        Returns:
            Each cell whose job has ended, and whether it is completed.
        """
        try:
            while True:
                queue = job_states(cell.job for cell in self.cells.values() if cell.job)
                ended = [
                    name for name, cell in self.cells.items() if queue is not None and cell.job not in queue
                ]
                if ended or not self.cells:
                    return [self._end(name) for name in ended]
                time.sleep(POLL)
        except KeyboardInterrupt:
            print(f"{len(self.cells)} cells stay with SLURM: python -m fedlight.sweeps status {self._sweep}")
            sys.exit(130)

    def close(self) -> None:
        self.cells.clear()

    def _end(self, name: str) -> tuple[PlannedCell, bool]:
        plan = self.cells.pop(name)
        cell = read_cell(self._sweep / name, plan, {})
        print(f"{name}: {cell.state}{f': {cell.error}' if cell.error else ''}", flush=True)
        return plan, cell.state == DONE


def split_into_arrays(cells: Sequence[str], limit: int | None) -> list[Sequence[str]]:
    """Splits cells, in order, into as few job arrays as MaxArraySize allows; into one if `limit` is None."""
    size = limit or max(1, len(cells))
    return [cells[first : first + size] for first in range(0, len(cells), size)]


def _job_return(overrides: list[str], completed: bool) -> JobReturn:
    """The return value of a cell's job, as Hydra expects it from a launcher."""
    end = JobReturn(overrides=overrides, status=JobStatus.COMPLETED if completed else JobStatus.FAILED)
    end.return_value = None if completed else CellFailed(1)
    return end
