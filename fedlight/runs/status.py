"""The state of each cell of a sweep, from its plan, the cells' folders and SLURM's queue."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlight.runs.plan import PLAN, PlannedCell, read_launches
from fedlight.runs.reader import CELL_FILES, CellFiles
from fedlight.runtime.lease import read_file_clock, read_holder
from fedlight.runtime.process_record import is_alive
from fedlight.runtime.slurm_jobs import ACTIVE_STATES, job_states

DONE = "done"  # its result is completed
RUNNING = "running"  # a process works on it
QUEUED = "queued"  # its SLURM job is pending, or a living process will run it later
INTERRUPTED = "interrupted"  # it was stopped or killed after it had begun
FAILED = "failed"  # it ended in an error
MISSING = "missing"  # it is planned, has not begun, and no job or process will run it
CORRUPT = "corrupt"  # its result cannot be read
UNFINISHED = (INTERRUPTED, FAILED, MISSING, CORRUPT)

JOB_LOGS = ".slurm"  # in the sweep's folder, a folder for each job
ERROR_PREFIX = "fedlight: error: "


@dataclass(frozen=True)
class SweepCell:
    """A cell of a sweep: its files and its state.

    Attributes:
        files: of its folder.
        state: one of the states above.
        rounds: number of rounds R, or None if neither the plan nor the cell's files tell.
        eta: estimated seconds for the remaining rounds of a running cell; None before the first.
        job: the latest SLURM job of the cell, or None.
        heartbeat: last heartbeat of the process that runs it, in seconds since 1970, or None.
        error: why it is interrupted, failed or corrupt, or None.
        typed: the configuration keys that the command of its sweep set or swept.
    """

    files: CellFiles
    state: str
    rounds: int | None
    eta: float | None
    job: str | None
    heartbeat: float | None
    error: str | None
    typed: frozenset[str] = frozenset()

    @property
    def cell(self) -> str:
        """Id of the cell; bytes of the folder's name that are no text are `?`."""
        return self.files.folder.name.encode(errors="replace").decode()

    @property
    def sweep(self) -> str:
        return self.files.folder.parent.name

    @property
    def round(self) -> int:
        """Number of completed rounds."""
        return len(self.files.rounds)

    @property
    def note(self) -> str:
        """Errors, and the progress of a cell without a result; may be empty."""
        progress = ""
        if self.files.result is None and self.files.folder.is_dir():
            with os.scandir(self.files.folder) as entries:
                seen = max((entry.stat(follow_symlinks=False).st_mtime for entry in entries), default=0.0)
            when = datetime.fromtimestamp(seen).astimezone().strftime("%Y-%m-%d %H:%M %Z")
            progress = f"{self.round} of {self.rounds or '?'} rounds done, last heartbeat {when}"
        stopped = self.files.result.stopped if self.files.result else None
        early = f"stopped early after round {stopped.round}: {stopped.reason}" if stopped else ""
        notes = dict.fromkeys([self.error or "", early, progress, *self.files.check()])
        return "; ".join(note for note in notes if note)

    def as_json(self) -> dict[str, Any]:
        """The row of `fedlight.sweeps status --json`."""
        keys = ("cell", "state", "round", "rounds", "eta", "job", "heartbeat", "error")
        return {key: getattr(self, key) for key in keys}


def read_sweep(sweep: Path) -> list[SweepCell]:
    """The cells of a sweep: planned cells in the order of their grid, then the others by name."""
    launches = read_launches(sweep)
    planned = {cell: plan for launch in launches for cell, plan in launch.cells.items()}
    inside = sorted(sweep.glob("[!.]*/"))
    folders = [path for path in inside if any(os.path.exists(path / name) for name in CELL_FILES)]
    cells = list(dict.fromkeys([*planned, *(path.name for path in folders)]))

    holders = [holder[0] for cell in cells if (holder := read_holder(sweep / cell))]
    processes = [*(launch.process for launch in launches), *holders]
    jobs = {process.job for process in processes} | {plan.job for plan in planned.values()}
    queue = job_states(job for job in jobs if job) or {}
    launched = {
        cell: datetime.fromisoformat(launch.process.since).timestamp()
        for launch in launches
        if is_alive(launch.process, math.inf, queue)
        for cell, plan in launch.cells.items()
        if plan.job is None
    }
    return [read_cell(sweep / cell, planned.get(cell), queue, launched.get(cell)) for cell in cells]


def find_cells(folder: Path) -> list[SweepCell]:
    """The cells of a sweep, of all sweeps in a folder, or the one cell whose folder it is; none elsewhere."""
    if any((folder / name).exists() for name in CELL_FILES):
        return [read_cell(folder, None, {})]
    return [cell for sweep in find_sweeps(folder) or [folder] for cell in read_sweep(sweep)]


def find_sweeps(folder: Path) -> list[Path]:
    """The sweeps in a folder; none if the folder is itself a sweep."""
    if (folder / PLAN).is_dir():
        return []
    inside = sorted(folder.glob("[!.]*/"))
    return [path for path in inside if (path / PLAN).is_dir() or any(path.glob("[!.]*/result.json"))]


def read_cell(
    folder: Path, plan: PlannedCell | None, queue: Mapping[str, str], launched: float | None = None
) -> SweepCell:
    """Determines the state of a cell.

    Args:
        folder: of the cell.
        plan: of the cell, or None.
        queue: states of the SLURM jobs of the plan and of the lease's holder.
        launched: start of a living process that will run the cell later, in seconds since 1970, or None.
    """
    files = CellFiles(folder, plan.config if plan else None)
    result, job = files.result, plan.job if plan else None
    status, error = (result.status, result.error) if result else (None, files.problems.get("result.json"))
    rounds = result.rounds if result else plan.rounds if plan else files.config.get("rounds")
    heartbeat = eta = None
    holder = read_holder(folder)
    now = read_file_clock(folder.parent) if holder else 0.0  # nothing is written to the cell's folder

    if status == "completed":
        state = DONE
    elif holder is not None and is_alive(holder[0], now - holder[1], queue):
        state, job, heartbeat = RUNNING, holder[0].job, holder[1]
        if files.rounds and rounds is not None:
            seconds = sum(row.get("seconds") or 0.0 for row in files.rounds)
            since = now - files.modified("rounds.csv")
            eta = max(0.0, (rounds - len(files.rounds)) * seconds / len(files.rounds) - since)
    elif job in queue:
        state = RUNNING if queue[str(job)] in ACTIVE_STATES else QUEUED
    elif launched is not None and files.modified("result.json") < launched:
        state = QUEUED
    elif status is not None:
        state = FAILED if status == "failed" else INTERRUPTED
    elif error is not None:
        state = CORRUPT
    elif holder is not None or files.rounds:
        state, error = INTERRUPTED, "ended without a result"
    elif job is not None and (message := _job_error(folder.parent, job)):
        state, error = FAILED, message
    else:
        state = MISSING
    typed = frozenset(o.lstrip("+~").partition("=")[0] for o in (plan.overrides if plan else ()))
    return SweepCell(files, state, rounds, eta, job, heartbeat, error if state in UNFINISHED else None, typed)


def _job_error(sweep: Path, job: str) -> str | None:
    """The last error on stderr of a job that left no result; None if the job never started."""
    log = sweep / JOB_LOGS / job / f"{job}_0_log.err"
    try:
        lines = log.read_text(errors="replace", encoding="utf-8").split("\n")
    except OSError:
        return None
    errors = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
    return errors[-1] if errors else f"ended without a result; see {log}"
