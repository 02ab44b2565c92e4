"""One process a cell: a process holds the folder it works in, and others learn which one does.

The kernel's lock decides where it reaches; where it does not, a signed file, which its holder touches as a
sign of life. That may err, so a holder looks whether the file is still its own before it stores anything.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from fedlight.runtime import slurm_jobs
from fedlight.runtime.errors import BadInput, Held
from fedlight.runtime.files import TEMPORARY

LOCK = ".lock"  # locked by the kernel while its holder lives
HOLDER = ".holder.json"  # who that is, for people and for nodes that do not see the kernel's lock
BEAT = 15.0  # seconds between two signs of life, the modification time of HOLDER
SILENCE = 60.0  # seconds without one, after which a holder out of sight counts as dead
PATIENCE = 90.0  # seconds for the lock of a dead holder to be released by a network's file system
STANDING_BY = ("SUSPENDED", "STOPPED")  # SLURM's states of a job that lives and gives no sign of it
AT_WORK = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", *STANDING_BY)
KINDS = {"pid": int, "restart": int, "job": str | None}  # of a holder's fields; the others are texts
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a file system that has none


@dataclass(frozen=True)
class Holder:
    """A process, described so that others can find out whether it lives.

    Attributes:
        host: its node's name, for people; several nodes may have one name.
        boot: names the time between two starts of that node; empty where there is no /proc.
        namespace: names the set of processes in which `pid` counts, one for each container.
        pid: its number.
        started: when, in the kernel's ticks: numbers are used again.
        job: of SLURM, or None.
        restart: how often SLURM had started that job again.
        since: local time in ISO 8601.
        token: random, new each time a folder is held.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    job: str | None
    restart: int
    since: str
    token: str = ""

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
    """Whether a process still runs, as far as it can be known from here.

    Args:
        holder: the process.
        silent: seconds since its last sign of life.
        jobs: SLURM's answer on `holder.job` where it was asked before; None to ask now.
    """
    here = this_process()
    if holder.boot and (holder.boot, holder.namespace) == (here.boot, here.namespace):
        return _started(holder.pid) == holder.started
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
    with suppress(OSError):
        found = _look(folder / HOLDER)
        if found is not None and (holder := _parse(found[0])) is not None:
            return holder, found[1]
    return None


def file_clock(folder: Path) -> float:
    """Now, by the clock of a folder's file system; by this node's where nothing can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=TEMPORARY) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


class Hold:
    """A folder that this process holds, as long as nobody takes it for dead."""

    def __init__(self, folder: Path, signed: bytes) -> None:
        self._folder = folder
        self._signed = signed
        self._checked = time.monotonic()

    def check(self, every: float = 0.0) -> None:
        """Raises Held where another process has taken the folder over; looks again after `every` seconds."""
        if time.monotonic() - self._checked < every:
            return
        self._checked = time.monotonic()
        if not self.is_mine():
            known = read_holder(self._folder)
            by = known[0] if known else "nobody knows whom"
            raise Held(f"{self._folder.name}: taken over by {by}; this process stops and stores nothing more")

    def is_mine(self) -> bool:
        """Whether the folder is still signed by this process."""
        found = _look(self._folder / HOLDER)
        return found is not None and found[0] == self._signed


@contextmanager
def hold(folder: Path) -> Iterator[Hold]:
    """Holds a folder for this process alone, on every node that sees it, and makes it if need be.

    A folder that is left empty is removed, with what was made above it.

    Args:
        folder: of the cell.

    Raises:
        Held: another process holds it.
        BadInput: nothing can be written there.
    """
    made = [folder, *(path for path in folder.parents if not path.exists())]
    signed = json.dumps(asdict(replace(this_process(), token=secrets.token_hex(16)))).encode()
    try:
        locked, file = _take(folder, signed)
    except OSError as error:
        _remove(made)
        if isinstance(error, Held):
            raise
        raise BadInput(f"output: cannot write to {folder}: {error.strerror}") from error
    ended = threading.Event()
    life = threading.Thread(target=_show_life, args=(file, ended), daemon=True)
    life.start()
    held = Hold(folder, signed)
    try:
        yield held
    finally:
        ended.set()
        life.join()
        if held.is_mine():
            with suppress(OSError):
                (folder / HOLDER).unlink()
                (folder / LOCK).unlink()
        os.close(file)
        os.close(locked)
        _remove(made)


def _take(folder: Path, signed: bytes) -> tuple[int, int]:
    """Becomes the holder; returns the descriptors of the locked file and of the signed one."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(FileNotFoundError):  # the holder before removed the folder under our hands
            folder.mkdir(parents=True, exist_ok=True)
            locked = _lock(folder / LOCK)
            if locked is not None:
                file = _sign(folder, signed)
                if file is not None:
                    return locked, file
                os.close(locked)
        known = read_holder(folder)
        if known and (time.monotonic() > deadline or is_alive(known[0], file_clock(folder) - known[1])):
            raise Held(f"{folder.name}: at work already: {known[0]}")
        if time.monotonic() > deadline:
            raise Held(f"{folder.name}: at work already: {folder / LOCK} is locked")
        time.sleep(0.1)


def _lock(path: Path) -> int | None:
    """Locks a file; returns its descriptor, or None where another process has it locked."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
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


def _sign(folder: Path, signed: bytes) -> int | None:
    """Writes who holds the folder; returns the file's descriptor, or None where a living holder did."""
    path, known = folder / HOLDER, _look(folder / HOLDER)
    if known is not None:
        if _lives(folder, *known):
            return None
        aside = folder / f"{TEMPORARY}{secrets.token_hex(16)}"
        with suppress(FileNotFoundError):
            path.rename(aside)  # of several processes one takes the dead holder's away
            found = _look(aside)
            if found is not None and found[0] != known[0]:  # another was faster, and has signed
                aside.rename(path)
                return None
            aside.unlink()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    os.write(file, signed)
    return file


def _look(path: Path) -> tuple[bytes, float] | None:
    """What a signed file holds and when it was touched, or None where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _parse(signed: bytes) -> Holder | None:
    try:
        fields = json.loads(signed)
        if any(not isinstance(value, KINDS.get(name, str)) for name, value in fields.items()):
            return None
        holder = Holder(**fields)
        datetime.fromisoformat(holder.since)
        return holder
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _lives(folder: Path, signed: bytes, touched: float) -> bool:
    """Whether the holder lives; one whose signature cannot be read, perhaps not yet, if it is new."""
    silent, holder = file_clock(folder) - touched, _parse(signed)
    return silent < SILENCE if holder is None else is_alive(holder, silent)


def _show_life(file: int, ended: threading.Event) -> None:
    """Touches one's own file, by its descriptor: whatever bears its name now may be a successor's."""
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(file)


def _remove(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


def _namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    """When a process of this node was started, in the kernel's ticks; empty where it runs no more."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""
