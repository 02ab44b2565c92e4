"""What SLURM says of jobs: which one this process is in, and which are queued or run."""

import os
import re
import subprocess
from collections.abc import Iterable

PATIENCE = 30  # seconds for an answer
SUSPENDED_STATES = ("SUSPENDED", "STOPPED")  # of a job whose processes live and send no heartbeat
ACTIVE_STATES = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", *SUSPENDED_STATES)


def this_job() -> str | None:
    """The job of this process, 12, or 12_3 in an array; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def this_restart() -> int:
    """How often SLURM has started this process's job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def is_available() -> bool:
    """Whether SLURM can be asked here; its commands may be installed where no cluster is."""
    try:
        return not subprocess.run(
            ["squeue", "--noheader", "--me"], capture_output=True, timeout=PATIENCE
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def max_array_size() -> int | None:
    """How many tasks a job array may have (SLURM's MaxArraySize); None where SLURM does not say."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, encoding="utf-8", timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return array_size_in(done.stdout)


def array_size_in(config: str) -> int | None:
    """MaxArraySize in what `scontrol show config` prints; None where it is missing, or 0 for no arrays."""
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return int(size[1]) or None if size else None


def job_states(jobs: Iterable[str]) -> dict[str, str] | None:
    """The state (PENDING, RUNNING, ...) of those jobs that have not ended.

    Args:
        jobs: ids as in `this_job`.

    Returns:
        id: state; None where SLURM cannot be asked.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    ids = ",".join(sorted({job.split("_")[0] for job in wanted}))
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={ids}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, encoding="utf-8", errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return {} if "Invalid job id" in done.stderr else None
    states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {job: state for job, state in states.items() if job in wanted}


def cancel(jobs: Iterable[str]) -> str | None:
    """Takes jobs out of the queue and ends those that run; returns what SLURM objected to, if anything."""
    try:
        done = subprocess.run(
            ["scancel", *jobs],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() or None
