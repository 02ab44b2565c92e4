"""Files that are either whole or absent, and what to do where one cannot be read or written."""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

BLOCK = 2**20  # bytes read at once
TEMPORARY = ".tmp-"
OURS = re.compile(rf"{re.escape(TEMPORARY)}.*[0-9a-f]{{32}}\b.*")
REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, which have too many files open",
    errno.EIO: "the disk, or the way to it, fails: have it looked at",
    errno.ELOOP: "a symbolic link stands where a file is written, and is not followed: remove it",
    errno.ESTALE: "the network's file system lost it: mount it again",
}


def explain(error: OSError) -> str:
    """Which path failed, why, and what to do, as far as the system says it."""
    message = error.strerror or str(error)
    if error.filename is not None:
        message = f"{error.filename}: {message}"
    if remedy := REMEDIES.get(error.errno or 0):
        message = f"{message}; {remedy}, and type the same command again"
    return message


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors inside name the path, as those of an open file do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with naming(path), path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def no_follow(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses a symbolic link: another user of the folder may have put it there.

    Raises:
        OSError: ELOOP, the path is a symbolic link.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def atomic(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there replaces `path` on success.

    Args:
        path: of the file; where it is a symbolic link, the link is replaced.
        durable: whether the file and its name are on the disk afterwards.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        with naming(path):
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode  # by the user's umask; a library may set its own when it writes
            yield temporary
            temporary.chmod(stat.S_IMODE(mode))
            with open(temporary, "rb", opener=no_follow) as file:
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes what processes that were killed left half-written in a folder and those below it."""
    for parent, _, names in os.walk(folder):
        for name in filter(OURS.fullmatch, names):
            Path(parent, name).unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Makes a new name in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
