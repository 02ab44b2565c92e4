"""Queries of SLURM: the job of this process, the states of jobs, limits; and cancelling of jobs."""

import os
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress

TIMEOUT = 30  # seconds for an answer
JOB_ID = r"^[0-9]{1,18}(_[0-9]{1,18})?$"
SUSPENDED_STATES = ("SUSPENDED", "STOPPED")  # of a job whose processes live and send no heartbeat
ACTIVE_STATES = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", *SUSPENDED_STATES)


def this_job() -> str | None:
    """The id of this process's job, `12`, or `12_3` in an array; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(JOB_ID, job) else None


def this_restart() -> int:
    """How many times SLURM has requeued this process's job."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def is_available() -> bool:
    """Whether SLURM answers; its commands may be installed without a cluster."""
    done = _run("squeue", "--noheader", "--me")
    return done is not None and done.returncode == 0


def max_array_size() -> int | None:
    """Maximum number of tasks of a job array (MaxArraySize); None if SLURM does not answer."""
    done = _run("scontrol", "show", "config")
    return None if done is None else parse_max_array_size(done.stdout)


def parse_max_array_size(config: str) -> int | None:
    """MaxArraySize in the output of `scontrol show config`; None if it is missing or 0."""
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return int(size[1]) or None if size else None


def job_states(jobs: Iterable[str]) -> dict[str, str] | None:
    """The states (PENDING, RUNNING, ...) of those jobs that have not ended.

    Args:
        jobs: ids as in `this_job`.

    Returns:
        State by id; None if SLURM does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    ids = ",".join(sorted({job.split("_")[0] for job in wanted}))
    done = _run("squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={ids}")
    if done is None:
        return None
    if done.returncode:
        return {} if "Invalid job id" in done.stderr else None
    states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {job: state for job, state in states.items() if job in wanted}


def cancel(jobs: Iterable[str]) -> str | None:
    """Cancels queued and running jobs; returns SLURM's error message, if any."""
    done = _run("scancel", *jobs)
    return "scancel does not answer" if done is None else done.stderr.strip() or None


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Runs a command of SLURM; returns None if it is not installed or does not answer."""
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command, capture_output=True, timeout=TIMEOUT, encoding="utf-8", errors="replace"
        )
    return None
