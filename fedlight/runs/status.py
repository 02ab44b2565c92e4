"""How the cells of a sweep stand, told from their folders and SLURM's queue."""

import csv
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from fedlight.runtime.lock import AT_WORK, HOLDER, is_alive, read_holder
from fedlight.runtime.slurm_jobs import job_states
from fedlight.runs.identity import read_result
from fedlight.runs.plan import read_launches

DONE, RUNNING, QUEUED = "done", "running", "queued"
INTERRUPTED, FAILED, MISSING = "interrupted", "failed", "missing"
UNFINISHED = (INTERRUPTED, FAILED, MISSING)
JOB_LOGS = ".slurm"  # in the sweep's folder, a folder for each job
CELL_FILES = ("config.yaml", "result.json", HOLDER)


@dataclass(frozen=True)
class CellState:
    """How a cell stands.

    Attributes:
        cell: its id.
        state: done, running, queued, interrupted, failed, or missing: planned, and nobody is to run it.
        round: rounds completed.
        rounds: R, or None where the cell has not said so yet.
        eta: seconds that the remaining rounds of a running cell will take, or None before the first.
        job: the SLURM job that runs it or last was to, or None.
        heartbeat: last sign of life of the process at work on it, in seconds since 1970, or None.
        error: why it failed, or None.
    """

    cell: str
    state: str
    round: int
    rounds: int | None
    eta: float | None
    job: str | None
    heartbeat: float | None
    error: str | None


def sweep_states(sweep: Path) -> list[CellState]:
    """The cells of a sweep: those planned in the order of their grid, then the others by name."""
    launches = read_launches(sweep)
    planned = {cell: plan for launch in launches for cell, plan in launch.cells.items()}
    folders = [path for path in sorted(sweep.glob("[!.]*/")) if any((path / f).exists() for f in CELL_FILES)]
    cells = list(dict.fromkeys([*planned, *(path.name for path in folders)]))

    known = {cell: found for cell in cells if (found := read_holder(sweep / cell))}
    processes = [*(launch.process for launch in launches), *(holder for holder, _ in known.values())]
    jobs = {process.job for process in processes} | {plan.job for plan in planned.values()}
    queue = job_states(job for job in jobs if job) or {}
    coming = {
        cell: datetime.fromisoformat(launch.process.since).timestamp()
        for launch in launches
        if is_alive(launch.process, math.inf, queue)
        for cell, plan in launch.cells.items()
        if plan.job is None
    }
    return [
        cell_state(
            sweep / cell,
            planned[cell].rounds if cell in planned else None,
            planned[cell].job if cell in planned else None,
            queue,
            coming.get(cell),
        )
        for cell in cells
    ]


def cell_state(
    folder: Path, rounds: int | None, job: str | None, queue: Mapping[str, str], coming: float | None = None
) -> CellState:
    """How one cell stands.

    Args:
        folder: of the cell.
        rounds: R where it is known.
        job: the SLURM job that last was to run the cell, or None.
        queue: SLURM's answer on this job and on that of the cell's holder.
        coming: since when a process lives that will run the cell in its turn, or None.
    """
    result = read_result(folder) or {}
    status, error = result.get("status"), result.get("error")
    round_, seconds, written = _progress(folder / "rounds.csv")
    rounds = result.get("rounds", rounds if rounds is not None else _configured_rounds(folder))
    heartbeat = eta = None
    known = read_holder(folder)

    if status == "completed":
        state = DONE
    elif known is not None and is_alive(known[0], time.time() - known[1], queue):
        state, job, heartbeat = RUNNING, known[0].job, known[1]
        if round_ and rounds is not None:
            eta = max(0.0, (rounds - round_) * seconds / round_ - (time.time() - written))
    elif job in queue:
        state = RUNNING if queue[str(job)] in AT_WORK else QUEUED
    elif coming is not None and (not result or _modified(folder / "result.json") < coming):
        state = QUEUED
    elif status in (FAILED, INTERRUPTED):
        state = status
    elif known is not None or round_:
        state, error = INTERRUPTED, "ended without a word"
    elif job is not None and (words := _last_words(folder.parent, job)):
        state, error = FAILED, words
    else:
        state = MISSING
    return CellState(
        folder.name, state, round_, rounds, eta, job, heartbeat, error if state in UNFINISHED else None
    )


def _progress(path: Path) -> tuple[int, float, float]:
    """Rounds completed, the seconds they took, and when the last was written."""
    try:
        with path.open(newline="") as file:
            rows = [float(row["seconds"]) for row in csv.DictReader(file)]
        return len(rows), sum(rows), path.stat().st_mtime
    except (OSError, ValueError, TypeError, KeyError):
        return 0, 0.0, 0.0


def _configured_rounds(folder: Path) -> int | None:
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
        return int(config["rounds"])
    return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_words(sweep: Path, job: str) -> str | None:
    """What a job that left no result wrote last on stderr; None where it never started."""
    log = sweep / JOB_LOGS / job / f"{job}_0_log.err"
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return None
    told = [line for line in lines if line.startswith("fedlight: error: ")]
    return told[-1].removeprefix("fedlight: error: ") if told else f"ended without a result; see {log}"
