"""The cells of a sweep as SLURM arrays, as few as the cluster allows, waited for or left alone."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import OmegaConf

from fedlight.runs.identity import is_done, print_done
from fedlight.runs.plan import PlannedCell, read_launch
from fedlight.runs.status import DONE, read_cell
from fedlight.runtime.errors import BadInput, CellFailed
from fedlight.runtime.slurm_jobs import answers, job_states, max_array_size

POLL = 5.0  # seconds between two looks at the queue
SHARED = ("name", "timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "nodes", "tasks_per_node")
"""What submitit names alike for every kind of cluster; the rest is its SLURM's own."""


@dataclass(frozen=True)
class CellJob:
    """What a job runs: `python -m fedlight.run ARGUMENTS`, in the job's own process."""

    arguments: list[str]

    def __call__(self) -> None:
        from fedlight import run
        from fedlight.hydra_command import DEBUG

        os.environ.pop(DEBUG, None)  # set by the launching process, for itself
        sys.argv = ["fedlight.run", *self.arguments]
        run.main()

    def checkpoint(self) -> Any:
        """Asked by submitit at preemption and time-out: the same cell again, in the same job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class SlurmArrayLauncher(SlurmLauncher):
    """Hydra's submitit launcher, for cells that can be resumed.

    It submits no cell twice, returns after submission if asked to (`detach`), else waits for all cells even
    where some fail, and needs no accounting (sacct): the queue and the cells' folders say how each ended.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits what is neither done nor queued.

        Raises:
            BadInput: there is no SLURM, or it refuses an array; those before it stay submitted.
        """
        assert self.config is not None
        sweep = Path(self.config.hydra.sweep.dir)
        plan = read_launch(sweep, sys.argv[1:], str(Path.cwd()))
        assert plan is not None
        planned = {tuple(cell.overrides): name for name, cell in plan.cells.items()}
        cells = [planned[tuple(overrides)] for overrides in job_overrides]

        queue = job_states(job for cell in cells if (job := plan.cells[cell].job))
        if queue is None or not answers():
            raise BadInput("hydra/launcher=slurm: squeue does not answer; is this a login node of SLURM?")
        new = []
        for cell in cells:
            if plan.cells[cell].job in queue:
                print(f"{cell}: with SLURM already, as job {plan.cells[cell].job}")
            elif is_done(sweep / cell):  # its job ended since the grid was checked
                print_done(sweep / cell)
            else:
                new.append(cell)
        for array in arrays(new, max_array_size()):
            jobs = self._submit([CellJob([*self._flags(), *plan.cells[cell].overrides]) for cell in array])
            for cell, job in zip(array, jobs, strict=True):
                plan.cells[cell].job = job
            plan.write(sweep)  # before the next array, which SLURM may refuse
            print(f"{len(array)} cells submitted as SLURM job {jobs[0].split('_')[0]}")
        if self.params["detach"]:
            print(f"python -m fedlight.sweeps status {sweep}    # their states")
            return []
        return self._wait({cell: plan.cells[cell] for cell in cells}, sweep)

    def _flags(self) -> list[str]:
        """What was typed for Hydra itself and a single cell needs as well."""
        assert self.config is not None
        sources = self.config.hydra.runtime.config_sources
        typed: Any = OmegaConf.to_container(self.config.hydra.overrides.hydra)  # references stay references
        folders = [source.path for source in sources if source.provider == "command-line"]
        overrides = [
            override
            for override in typed
            if not override.lstrip("+~").startswith(("hydra.mode", "hydra/launcher", "hydra.launcher"))
        ]
        return [*(flag for folder in folders for flag in ("--config-dir", folder)), *overrides]

    def _submit(self, cells: Sequence[CellJob]) -> list[str]:
        import submitit

        asked = {key: value for key, value in self.params.items() if key != "detach"}
        folder, timeouts = asked.pop("submitit_folder"), asked.pop("max_num_timeout")
        if cpus := asked["cpus_per_task"]:  # srun does not take them over from sbatch since SLURM 22.05
            asked["srun_args"] = [f"--cpus-per-task={cpus}", *asked["srun_args"]]
        if asked["nodes"] > 1:  # the cell runs on the first of them, and starts what works on the others
            asked["srun_args"] = ["--nodes=1", "--ntasks=1", *asked["srun_args"]]
        extra = asked.pop("additional_parameters")
        asked["additional_parameters"] = {"requeue": True, **extra}
        parameters = {key if key in SHARED else f"slurm_{key}": value for key, value in asked.items()}
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

    def _wait(self, cells: dict[str, PlannedCell], sweep: Path) -> list[JobReturn]:
        """Waits until SLURM has none of the jobs any more; prints the state in which each cell ended."""
        left, ends = dict(cells), []
        try:
            while left:
                queue = job_states(str(cell.job) for cell in left.values())
                ended = (
                    [] if queue is None else [name for name, cell in left.items() if cell.job not in queue]
                )
                for name in ended:
                    plan = left.pop(name)
                    cell = read_cell(sweep / name, plan, {})
                    print(f"{name}: {cell.state}{f': {cell.error}' if cell.error else ''}", flush=True)
                    ends.append(_job_return(plan.overrides, cell.state == DONE))
                if left:
                    time.sleep(POLL)
        except KeyboardInterrupt:
            print(f"{len(left)} cells stay with SLURM: python -m fedlight.sweeps status {sweep}")
            sys.exit(130)
        return ends


def arrays(cells: Sequence[str], limit: int | None) -> list[Sequence[str]]:
    """The cells in as few job arrays as SLURM's MaxArraySize allows, in order; in one where that is None."""
    size = limit or max(1, len(cells))
    return [cells[first : first + size] for first in range(0, len(cells), size)]


def _job_return(overrides: list[str], completed: bool) -> JobReturn:
    """The end of a cell, as Hydra expects it of a launcher."""
    end = JobReturn(overrides=overrides, status=JobStatus.COMPLETED if completed else JobStatus.FAILED)
    end.return_value = None if completed else CellFailed(1)
    return end
