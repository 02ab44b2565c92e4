"""What a finished cell must still hold: `files.sha256`, in the form of the program sha256sum."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fedlight.runtime.files import atomic, file_sha256

CHECKSUMS = "files.sha256"


def write_checksums(folder: Path, paths: Iterable[Path]) -> None:
    """Notes the SHA-256 of files below a cell's folder."""
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    with atomic(folder / CHECKSUMS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def lost_file(folder: Path) -> Path | None:
    """The first noted file that is missing or damaged; None where all are whole, or none was noted."""
    lines: list[str] = []
    with suppress(FileNotFoundError):
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    for line in lines:
        sha256, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or file_sha256(path) != sha256:
            return path
    return None
