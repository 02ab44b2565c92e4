"""Files written atomically, and messages on files that cannot be read or written."""

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
    """Path, reason and, if known, remedy of a failed file operation."""
    message = error.strerror or str(error)
    if error.filename is not None:
        message = f"{error.filename}: {message}"
    if remedy := REMEDIES.get(error.errno or 0):
        message = f"{message}; {remedy}, and type the same command again"
    return message


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to errors of the block, since errors of an open file do not name it."""
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
    """An `opener` for `open` that rejects symbolic links, which another user of the folder may have made.

    Raises:
        OSError: ELOOP, the path is a symbolic link.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def atomic(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file written there replaces `path` if the block succeeds.

    Args:
        path: of the file; a symbolic link is replaced, not followed.
        durable: whether file and name are flushed to the disk.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        with naming(path):
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode  # by the user's umask; libraries may set another one
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
    """Removes the temporary files of killed processes in a folder and in the folders below it."""
    for parent, _, names in os.walk(folder):
        for name in filter(OURS.fullmatch, names):
            Path(parent, name).unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Flushes the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
