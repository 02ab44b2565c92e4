"""Checksums of a finished cell's files: `files.sha256`, in the format of sha256sum."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fedlight.runtime.files import atomic, file_sha256

CHECKSUMS = "files.sha256"


def write_checksums(folder: Path, paths: Iterable[Path]) -> None:
    """Writes the SHA-256 of files below a cell's folder."""
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    with atomic(folder / CHECKSUMS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def find_lost_file(folder: Path) -> Path | None:
    """The first listed file that is missing or damaged; None if all are intact, or there is no list."""
    lines: list[str] = []
    with suppress(FileNotFoundError):
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    for line in lines:
        sha256, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or file_sha256(path) != sha256:
            return path
    return None
