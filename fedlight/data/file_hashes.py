"""Hashes of files' contents, cached until a file changes."""

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
    """SHA-256 and MD5 of a file's content, after decompression where its name ends in .gz."""

    sha256: str
    md5: str


UNREADABLE = FileHash("", "")
"""The hash of a file that cannot be opened."""


def file_hashes(folder: Path, files: Sequence[Path], cache: str) -> list[FileHash]:
    """Hashes each file, or returns the hash that an earlier call cached.

    A cached hash is valid while size, modification time, change time and inode are unchanged. An archive or
    `touch` can set a modification time, but the file system alone sets the change time and the inode.

    Args:
        folder: that the files are in.
        files: to hash, below `folder`.
        cache: fedlight's cache folder.

    Returns:
        The hash of each file, UNREADABLE for one that cannot be opened.
    """
    key = hashlib.blake2b(_bytes(str(folder)), digest_size=8).hexdigest()
    path = Path(cache) / "hashes" / f"{folder.name}-{key}.json"
    writable = True
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError:  # another user's file, which is left alone
        cached, writable = {}, False
    except (OSError, ValueError):
        cached = {}
    entries = dict(cached) if isinstance(cached, dict) else {}
    hashes = []
    for file in files:
        name = str(file.relative_to(folder))
        try:
            status = file.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            if entries.get(name, [])[:-2] != stamp:
                entries[name] = [*stamp, *_hash(file)]
            hashes.append(FileHash(*entries[name][-2:]))
        except OSError:
            hashes.append(UNREADABLE)
    if writable and entries != cached:
        with suppress(OSError):  # without the cache, files are hashed again
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(entries), encoding="utf-8")
    return hashes


def folder_digest(folder: Path, files: Sequence[Path], cache: str, layout: str = "") -> str:
    """A short hash of the names and contents of files below a folder, and of the folder's layout."""
    digest = hashlib.blake2b(layout.encode(), digest_size=4)
    for path, content in zip(files, file_hashes(folder, files, cache), strict=True):
        digest.update(_bytes(f"{path.relative_to(folder)}\0{content.sha256}\n"))
    return digest.hexdigest()


def _bytes(text: str) -> bytes:
    """A path in the file system's bytes, where it is not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _hash(path: Path) -> FileHash:
    content = _content(path)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return FileHash(hashlib.sha256(content).hexdigest(), md5)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        with suppress(OSError, EOFError, zlib.error):  # broken: the loader reports it
            return gzip.decompress(content)
    return content
