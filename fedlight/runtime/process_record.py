"""The record of a process, by which other processes, on any machine, find out whether it still runs."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass

from fedlight.runtime import slurm_jobs

HEARTBEAT_TIMEOUT = (
    60.0  # seconds without a heartbeat, after which a process on another machine counts as ended
)

Text = Annotated[str, StringConstraints(max_length=10_000)]
Job = Annotated[str, StringConstraints(pattern=slurm_jobs.JOB_ID)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Time = Annotated[Text, AfterValidator(lambda text: datetime.fromisoformat(text) and text)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class ProcessRecord:
    """Identifies a process; the fields are validated, since a record is read from files.

    Attributes:
        host: name of its machine, for messages only: several machines may share a name.
        boot: kernel's id of the machine's current boot; empty where there is no /proc.
        namespace: kernel's id of the process namespace in which `pid` counts; a container has its own.
        pid: process number.
        started: start time in kernel ticks, since process numbers are used again.
        job: SLURM job, `12` or `12_3`, or None.
        restart: number of times that SLURM had requeued the job.
        since: local time of the record in ISO 8601.
        token: random; distinguishes two leases of one process.
    """

    host: Text
    boot: Text
    namespace: Text
    pid: Number
    started: Text
    job: Job | None
    restart: Number
    since: Time
    token: Text = ""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def describe_this_process() -> ProcessRecord:
    """The record of the calling process, without a token."""
    boot, namespace = _read_machine()
    return ProcessRecord(
        host=socket.gethostname(),
        boot=boot,
        namespace=namespace,
        pid=os.getpid(),
        started=_read_start(os.getpid()),
        job=slurm_jobs.this_job(),
        restart=slurm_jobs.this_restart(),
        since=datetime.now().isoformat(sep=" ", timespec="seconds"),
    )


def is_alive(process: ProcessRecord, silence: float, jobs: Mapping[str, str] | None = None) -> bool:
    """Whether a process still runs, as far as this machine can tell.

    On the same boot of the same machine the kernel knows. Otherwise SLURM knows whether a job has ended or is
    suspended. Otherwise a process lives if its last heartbeat is recent.

    Args:
        process: its record.
        silence: seconds since its last heartbeat.
        jobs: states of SLURM jobs by id, if SLURM was queried before; None to query it now.
    """
    if process.boot and (process.boot, process.namespace) == _read_machine():
        return _read_start(process.pid) == process.started
    if process.job is not None:
        if process.job == slurm_jobs.this_job() and process.restart < slurm_jobs.this_restart():
            return False  # this process is the same job, requeued
        states = slurm_jobs.job_states([process.job]) if jobs is None else jobs
        state = None if states is None else states.get(process.job, "ENDED")
        if state is not None and state not in slurm_jobs.ACTIVE_STATES:
            return False
        if state in slurm_jobs.SUSPENDED_STATES:
            return True
    return silence < HEARTBEAT_TIMEOUT


def _read_machine() -> tuple[str, str]:
    """The kernel's ids of the machine's boot and of this process's namespace; empty without /proc."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return boot, os.readlink("/proc/self/ns/pid")
    return "", ""


def _read_start(pid: int) -> str:
    """Start time of a process of this machine in kernel ticks; empty if it does not run."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""
