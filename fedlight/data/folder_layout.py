"""The layout of a folder of images: one folder a class, or train and test folders of a published set."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fedlight.data.folder_files import list_sub_folders
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import legible

SUFFIX = r"([ _-]?(set|data|images|split))?[ _-]?([ab]|\d+)?"
ROLES = {
    "train": re.compile(rf"train(ing)?{SUFFIX}", re.IGNORECASE),
    "test": re.compile(rf"test(ing)?{SUFFIX}", re.IGNORECASE),
    "val": re.compile(rf"(val(id)?(ation)?|dev){SUFFIX}", re.IGNORECASE),
}
"""Names of the folders that hold the parts of a published set."""


class PublishedSplit(NamedTuple):
    """The folders of a published set: images to train on, images to test on, and unused ones."""

    train: Path
    test: Path
    unused: list[Path]


def find_split(root: Path) -> PublishedSplit | None:
    """The train and test folders of a published set, or None where the folders of `root` are classes.

    Raises:
        BadInput: some folders are named as parts of a set, and it is ambiguous what to train and test on.
    """
    folders = list_sub_folders(root)
    roles = {path: role for path in folders if (role := _role(path))}
    count = Counter(roles.values())
    if len(count) < 2:
        _reject_split_classes(folders)
        return None
    names = ", ".join(legible(path.name) for path in roles)
    train = min((path for path, role in roles.items() if role == "train"), default=None)
    advice = f"{root} holds the folders {names}, which are parts of a set and no classes: "
    if others := [path for path in folders if path not in roles]:
        advice += f"move {legible(others[0].name)} elsewhere, "
    elif not count["train"]:
        advice += "rename the one to train on to train, "
    elif not count["test"]:
        advice += "rename the one to test on to test, "
    elif count["train"] > 1 or count["test"] > 1:
        advice += "keep one folder to train on and one to test on, "
    else:
        test = next(path for path, role in roles.items() if role == "test")
        assert train is not None
        if bool(list_sub_folders(train)) == bool(list_sub_folders(test)):
            return PublishedSplit(train, test, [path for path in roles if path not in (train, test)])
        advice += "only one of them has a folder for each class; lay out both alike, "
    raise BadInput(
        f"data.root: {advice}or set data.root={train or min(roles)} to use that part alone, "
        "of which a fifth is held out for testing"
    )


def is_split(root: Path) -> bool:
    """Whether the folder is split into train and test; False where `find_split` raises."""
    try:
        return find_split(root) is not None
    except (BadInput, OSError):
        return False


def _role(path: Path) -> str | None:
    return next((role for role, name in ROLES.items() if name.fullmatch(path.name)), None)


def _reject_split_classes(folders: list[Path]) -> None:
    """Raises BadInput where the classes themselves are split into train and test."""
    for folder in folders:
        parts = [path for path in list_sub_folders(folder) if _role(path)]
        if len({_role(path) for path in parts}) > 1:
            names = " and ".join(legible(path.name) for path in parts)
            raise BadInput(
                f"data.root: {folder} holds the folders {names}, so that images to test on would be trained "
                f"on: set data.root={folder}, or move the images to train and test on into folders of those "
                f"names directly in {folder.parent}"
            )
