"""The files below a data set's folder, the same for loading and for hashing."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Walk(NamedTuple):
    """What is below a folder.

    Attributes:
        files: regular files, and links that lead nowhere, sorted by path.
        closed: folders that this user may not list.
        left_out: how many of each kind were left out: hidden files and folders, links back to a folder above
            them, and what is neither a file nor a folder.
    """

    files: list[Path]
    closed: list[Path]
    left_out: Counter[str]


def walk(folder: Path, deep: bool = True) -> Walk:
    """Lists the files below a folder; links to files and folders are followed.

    A link to a folder that contains it is not entered. Names that begin with a dot are hidden.

    Args:
        folder: to begin with.
        deep: whether folders in it are entered.
    """
    found = Walk([], [], Counter())
    _enter(folder, (), found, deep)
    found.files.sort()
    found.closed.sort()
    return found


def sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder, links to folders among them, sorted; hidden ones do not count.

    None where the user may not list it, which `walk` notes.
    """
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return []
    return sorted(folder / entry.name for entry in entries if entry.name[0] != "." and _is_folder(entry))


def _enter(folder: Path, above: tuple[tuple[int, int], ...], found: Walk, deep: bool = True) -> None:
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError:
        found.closed.append(folder)
        return
    here = status.st_dev, status.st_ino
    if here in above:
        found.left_out["link back to a folder above it"] += 1
        return
    for entry in entries:
        path, is_folder = folder / entry.name, _is_folder(entry)
        if entry.name.startswith("."):
            found.left_out["hidden folder" if is_folder else "hidden file"] += 1
        elif is_folder:
            if deep:
                _enter(path, (*above, here), found)
        elif _is_file(entry) or not path.exists():
            found.files.append(path)
        else:
            found.left_out["special file"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Unlike `Path.is_dir`, it takes no further call to the file system but for a link."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
