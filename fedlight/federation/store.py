"""Stored bytes, verified by their hash; and the versions of a state, one file for each round."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlight.federation.messages import State, fingerprint, pack, unpack
from fedlight.runtime.errors import Damaged
from fedlight.runtime.files import atomic, naming


def verify(content: bytes, hash_: str, path: Path) -> None:
    """Checks bytes that were read from a file.

    Raises:
        Damaged: they do not have the hash that they had when they were written.
    """
    if fingerprint(content) != hash_:
        raise Damaged(f"{path} is damaged")


class Versions:
    """The versions of one state: files `PREFIXrNNNN-HASH.safetensors`, in the format of a message.

    HASH is the hash of the file's bytes. Files with other names are ignored.

    Args:
        folder: of the files; it may be missing.
        cell: id of the federation; a file of another one counts as damaged.
        prefix: distinguishes several states in one folder.
        repair: whether a damaged file is renamed to `NAME.damaged`.
    """

    def __init__(self, folder: Path, cell: str, prefix: str = "", repair: bool = True) -> None:
        self._folder = folder
        self._cell = cell
        self._prefix = prefix
        self._repair = repair
        self._name = re.compile(rf"{re.escape(prefix)}r(\d+)-[0-9a-f]{{16}}\.safetensors")

    def find(self) -> dict[int, Path]:
        """The file of each round."""
        return dict(self._files())

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, State]]:
        """Header and tensors of a version.

        Raises:
            Damaged: the file is missing, is not what was written, or belongs to another cell.
        """
        try:
            with naming(path):
                content = path.read_bytes()
        except FileNotFoundError as error:
            raise Damaged(f"{path} is missing") from error
        try:
            verify(content, path.stem.rpartition("-")[2], path)
            header, groups = unpack(content)
            if header.get("cell") != self._cell:
                raise Damaged(f"{path} belongs to another cell")
        except Damaged:
            if self._repair:
                with suppress(FileNotFoundError):
                    path.rename(path.with_name(f"{path.name}.damaged"))
            raise
        return header, groups

    def write(self, round_: int, header: dict[str, Any], groups: dict[str, State]) -> str:
        """Stores the version of a round in place of any other one of that round; returns its hash."""
        content = pack({**header, "cell": self._cell}, groups)
        hash_ = fingerprint(content)
        path = self._folder / f"{self._prefix}r{round_:04d}-{hash_}.safetensors"
        with atomic(path) as temporary:
            temporary.write_bytes(content)
        for version, other in list(self._files()):
            if version == round_ and other != path:
                other.unlink(missing_ok=True)
        return hash_

    def remove(self, is_obsolete: Callable[[int], bool]) -> None:
        """Removes the versions of those rounds for which `is_obsolete` is true."""
        for version, path in list(self._files()):
            if is_obsolete(version):
                path.unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[int, Path]]:
        """Round and path of each version; after a kill a round may have two."""
        with suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                match = self._name.fullmatch(path.name)
                if match and path.is_file():
                    yield int(match[1]), path
