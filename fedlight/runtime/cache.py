"""Files of the cache, which many processes need and one makes."""

import errno
import os
import pwd
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from safetensors import SafetensorError

from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import TEMPORARY, atomic

T = TypeVar("T")


def load_or_make(path: Path, read: Callable[[Path], T], make: Callable[[Path], object]) -> T:
    """Loads a file of the cache, and makes it first if it is missing or damaged.

    Of several processes one makes the file and the others wait. A file without read permission is an error
    and is not replaced.

    Args:
        path: of the file; its folder is made if it is missing.
        read: returns the file's content; OSError, ValueError, KeyError or SafetensorError mean damage.
        make: writes the file to the path that it is given.

    Raises:
        BadInput: the cache cannot be read or written.
    """
    try:
        content = _try(read, path)
        if content is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{path.name}.lock")):
                content = _try(read, path)
                if content is None:
                    remove_unfinished(path)
                    with atomic(path) as temporary:
                        make(temporary)
                    content = read(path)
    except OSError as error:
        raise BadInput(f"the cache cannot be used: {explain_cache(error, 'FEDLIGHT_CACHE')}") from error
    return content


def _try(read: Callable[[Path], T], path: Path) -> T | None:
    try:
        path.open("rb").close()  # readers of libraries hide that a permission is missing
        return read(path)
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def explain_cache(error: OSError, keys: str) -> str:
    """Why a file of the cache cannot be used, and what to do; the owner is named if a permission is missing.

    Args:
        error: `filename` is the file or folder that failed.
        keys: the settings that choose the cache's folder, such as `FEDLIGHT_CACHE`.
    """
    reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}; set {keys} to a folder with room"
    barrier = _barrier(Path(os.fsdecode(error.filename))) if error.filename else None
    whose = "" if barrier is None else f"; {barrier} belongs to {_owner(barrier)}, mode {_mode(barrier):04o}"
    return (
        f"{reason}{whose}: its owner can let others use it (chmod -R g+rwX, and umask 002 for what is made "
        f"later), or set {keys} to a folder of your own"
    )


def _barrier(path: Path) -> Path | None:
    """The path itself, or else the nearest folder above it whose status can be read."""
    for place in (path, *path.parents):
        with suppress(OSError):
            place.stat()
            return place
    return None


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _owner(path: Path) -> str:
    """The name of a file's owner, or the number of a user without a name."""
    uid = path.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def remove_unfinished(path: Path) -> None:
    """Removes this file's temporaries of killed processes; call it while no process makes the file."""
    for left in path.parent.glob(f"{TEMPORARY}{path.stem}-*"):
        left.unlink(missing_ok=True)
