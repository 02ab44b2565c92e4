"""One process a cell: whoever works in a folder holds it, and all others are told who does."""

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from fedlight.runtime import slurm_jobs
from fedlight.runtime.errors import BadInput, Held

LOCK = ".lock"  # locked by the kernel while its holder lives
HOLDER = ".holder.json"  # who that is, for people and for nodes that do not see the kernel's lock
BEAT = 15.0  # seconds between two signs of life, the modification time of HOLDER
SILENCE = 60.0  # seconds without one, after which a holder out of sight counts as dead
PATIENCE = 90.0  # seconds for the lock of a dead holder to be released by a network's file system
STANDING_BY = ("SUSPENDED", "STOPPED")  # SLURM's states of a job that lives and gives no sign of it
AT_WORK = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", *STANDING_BY)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a file system that has none


@dataclass(frozen=True)
class Holder:
    """A process, so described that others can tell whether it lives.

    Attributes:
        host: its node.
        boot: names the time between two starts of that node; empty where there is no /proc.
        namespace: names the set of processes in which `pid` counts, one for each container.
        pid: its number.
        started: when, in the kernel's ticks: numbers are used again.
        job: of SLURM, or None.
        restart: how often SLURM had started that job again.
        since: local time in ISO 8601.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    job: str | None
    restart: int
    since: str

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def this_process() -> Holder:
    """Describes the process that asks."""
    return Holder(
        socket.gethostname(),
        _boot(),
        _namespace(),
        os.getpid(),
        _started(os.getpid()),
        slurm_jobs.this_job(),
        slurm_jobs.this_restart(),
        datetime.now().isoformat(sep=" ", timespec="seconds"),
    )


def is_alive(holder: Holder, silent: float, jobs: Mapping[str, str] | None = None) -> bool:
    """Whether a process still runs, as far as it can be told from here.

    Args:
        holder: the process.
        silent: seconds since its last sign of life.
        jobs: SLURM's answer on `holder.job` where it was asked before; None to ask now.
    """
    here = this_process()
    if holder.boot and (holder.boot, holder.namespace) == (here.boot, here.namespace):
        return _started(holder.pid) == holder.started
    if holder.host == here.host and holder.boot != here.boot:
        return False
    if holder.job is not None:
        if holder.job == here.job and holder.restart < here.restart:
            return False
        answer = slurm_jobs.job_states([holder.job]) if jobs is None else jobs
        state = None if answer is None else answer.get(holder.job, "ENDED")
        if state is not None and state not in AT_WORK:
            return False
        if state in STANDING_BY:
            return True
    return silent < SILENCE


def read_holder(folder: Path) -> tuple[Holder, float] | None:
    """Who holds a folder, or held it when it died, and the time of its last sign of life."""
    try:
        path = folder / HOLDER
        return Holder(**json.loads(path.read_text())), path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone, on every node that sees it, and makes it if need be.

    A folder that is left empty is removed, with what was made above it.

    Args:
        folder: of the cell.

    Raises:
        Held: another process holds it.
        BadInput: nothing can be written there.
    """
    made = [folder, *(path for path in folder.parents if not path.exists())]
    try:
        handle = _take(folder)
    except OSError as error:
        _remove(made)
        if isinstance(error, Held):
            raise
        raise BadInput(f"output: cannot write to {folder}: {error.strerror}") from error
    ended = threading.Event()
    threading.Thread(target=_show_life, args=(folder / HOLDER, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):
            (folder / HOLDER).unlink()
            (folder / LOCK).unlink()
        os.close(handle)
        _remove(made)


def _take(folder: Path) -> int:
    """Becomes the holder; returns the descriptor of the locked file."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(FileNotFoundError):  # the holder before removed the folder under our hands
            folder.mkdir(parents=True, exist_ok=True)
            handle = _lock(folder / LOCK)
            if handle is not None:
                if _sign(folder):
                    return handle
                os.close(handle)
        known = read_holder(folder)
        if known is not None and (time.monotonic() > deadline or _lives(known)):
            raise Held(f"{folder.name}: at work already: {known[0]}")
        if time.monotonic() > deadline:
            raise Held(f"{folder.name}: at work already: {folder / LOCK} is locked")
        time.sleep(0.1)


def _lock(path: Path) -> int | None:
    """Locks a file; returns its descriptor, or None where another process has it locked."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                return None
            raise
    if os.fstat(handle).st_nlink == 0:  # the holder before removed it between our two steps
        os.close(handle)
        return None
    return handle


def _sign(folder: Path) -> bool:
    """Writes who holds the folder, in one step that fails where a living holder is written already."""
    path, known = folder / HOLDER, read_holder(folder)
    if known is not None and _lives(known):
        return False
    with tempfile.TemporaryDirectory(dir=folder, prefix=HOLDER) as scratch:
        mine, theirs = Path(scratch, "mine"), Path(scratch, HOLDER)
        mine.write_text(json.dumps(asdict(this_process())))
        with suppress(FileNotFoundError):
            path.rename(theirs)
        try:
            found = read_holder(Path(scratch))
            if found is not None and found[0] != (known and known[0]):  # another node was faster
                os.link(theirs, path)
                return False
            os.link(mine, path)
        except FileExistsError:
            return False
    return True


def _lives(known: tuple[Holder, float]) -> bool:
    holder, seen = known
    return is_alive(holder, time.time() - seen)


def _show_life(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _remove(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    """When a process of this node was started, in the kernel's ticks; empty where it runs no more."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""
