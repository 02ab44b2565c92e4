"""Hashes of files' contents, noted in the cache for as long as a file stays the same one."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fedlight.runtime.files import atomic


class FileHash(NamedTuple):
    """SHA-256 and MD5 of a file's content, unzipped where its name ends in .gz."""

    sha256: str
    md5: str


UNREADABLE = FileHash("", "")
"""Of a file that cannot be opened."""


def file_hashes(folder: Path, files: Sequence[Path], cache: str) -> list[FileHash]:
    """Hashes each file, or takes the hash from the notes of an earlier call.

    A note counts while size, modification time, change time and inode are those of then. An archive or
    `touch` sets a modification time at will, but the change time and the inode are the file system's own.

    Args:
        folder: that the files are in.
        files: to hash, below `folder`.
        cache: where the notes are kept.

    Returns:
        The hash of each file, UNREADABLE for one that cannot be opened.
    """
    key = hashlib.blake2b(_bytes(str(folder)), digest_size=8).hexdigest()
    notes = Path(cache) / "hashes" / f"{folder.name}-{key}.json"
    keep = True
    try:
        before = json.loads(notes.read_text(encoding="utf-8"))
    except PermissionError:  # another user's, which are left alone
        before, keep = {}, False
    except (OSError, ValueError):
        before = {}
    known = dict(before) if isinstance(before, dict) else {}
    hashes = []
    for path in files:
        name = str(path.relative_to(folder))
        try:
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            if known.get(name, [])[:-2] != stamp:
                known[name] = [*stamp, *_hash(path)]
            hashes.append(FileHash(*known[name][-2:]))
        except OSError:
            hashes.append(UNREADABLE)
    if keep and known != before:
        with suppress(OSError):  # a cache: without it, files are hashed again
            notes.parent.mkdir(parents=True, exist_ok=True)
            with atomic(notes) as temporary:
                temporary.write_text(json.dumps(known), encoding="utf-8")
    return hashes


def folder_digest(folder: Path, files: Sequence[Path], cache: str, layout: str = "") -> str:
    """A short hash of names and contents of files below a folder, and of how the folder is laid out."""
    digest = hashlib.blake2b(layout.encode(), digest_size=4)
    for path, content in zip(files, file_hashes(folder, files, cache), strict=True):
        digest.update(_bytes(f"{path.relative_to(folder)}\0{content.sha256}\n"))
    return digest.hexdigest()


def _bytes(text: str) -> bytes:
    """A path as bytes; its parts that are not UTF-8 as the file system has them."""
    return text.encode("utf-8", "surrogateescape")


def _hash(path: Path) -> FileHash:
    content = _content(path)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return FileHash(hashlib.sha256(content).hexdigest(), md5)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        with suppress(OSError, EOFError, zlib.error):  # broken: the loader says so
            return gzip.decompress(content)
    return content
