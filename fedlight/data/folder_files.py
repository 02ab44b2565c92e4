"""Lists the files below a data set's folder, in one way for loading and for hashing."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Listing(NamedTuple):
    """The content of a folder.

    Attributes:
        files: regular files and broken links, sorted by path.
        forbidden: folders that this user may not list, sorted by path.
        left_out: number of entries of each kind that are not listed: hidden files and folders, links to a
            folder that contains them, and special files.
    """

    files: list[Path]
    forbidden: list[Path]
    left_out: Counter[str]


def list_files(folder: Path, recursive: bool = True) -> Listing:
    """Lists the files in a folder; links to files and folders are followed.

    A link to a folder that contains it is not entered. Names that begin with a dot are hidden.

    Args:
        folder: to list.
        recursive: whether folders in it are entered.
    """
    listing = Listing([], [], Counter())
    _add(folder, (), listing, recursive)
    listing.files.sort()
    listing.forbidden.sort()
    return listing


def list_sub_folders(folder: Path) -> list[Path]:
    """The visible folders in a folder, including links to folders, sorted.

    It is empty where this user may not list the folder, which `list_files` reports.
    """
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return []
    return sorted(folder / entry.name for entry in entries if entry.name[0] != "." and _is_folder(entry))


def _add(folder: Path, parents: tuple[tuple[int, int], ...], listing: Listing, recursive: bool) -> None:
    """Adds the entries of a folder; `parents` are the devices and inodes of the folders that lead to it."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError:
        listing.forbidden.append(folder)
        return
    identity = status.st_dev, status.st_ino
    if identity in parents:
        listing.left_out["link back to a folder above it"] += 1
        return
    for entry in entries:
        path, is_folder = folder / entry.name, _is_folder(entry)
        if entry.name.startswith("."):
            listing.left_out["hidden folder" if is_folder else "hidden file"] += 1
        elif is_folder:
            if recursive:
                _add(path, (*parents, identity), listing, recursive)
        elif _is_file(entry) or not path.exists():
            listing.files.append(path)
        else:
            listing.left_out["special file"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Unlike `Path.is_dir`, it needs no further system call, except for a link."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
