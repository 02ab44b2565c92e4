"""How a folder of images is laid out: by class, or by train and test as published sets are."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fedlight.data.walk import sub_folders
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import legible

ROLES = {
    "train": re.compile(r"train(ing)?([ _-]?(set|data|images|split))?[ _-]?([ab]|\d+)?", re.IGNORECASE),
    "test": re.compile(r"test(ing)?([ _-]?(set|data|images|split))?[ _-]?([ab]|\d+)?", re.IGNORECASE),
    "val": re.compile(
        r"(val(id)?(ation)?|dev)([ _-]?(set|data|images|split))?[ _-]?([ab]|\d+)?", re.IGNORECASE
    ),
}
"""What a folder is called that holds the images of a part of a published set."""


class PublishedSplit(NamedTuple):
    """The folders of a published set: images to train on, to test on, and those that are not used."""

    train: Path
    test: Path
    unused: list[Path]


def find_split(root: Path) -> PublishedSplit | None:
    """The folders train and test of a published set, or None where the folders of `root` are classes.

    Raises:
        BadInput: some folders are named as parts of a set, and it is not clear what to train and test on.
    """
    folders = sub_folders(root)
    roles = {path: role for path in folders if (role := _role(path))}
    count = Counter(roles.values())
    if len(count) < 2:
        _refuse_nested(folders)
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
        if bool(sub_folders(train)) == bool(sub_folders(test)):
            return PublishedSplit(train, test, [path for path in roles if path not in (train, test)])
        advice += "only one of them has a folder for each class; lay out both alike, "
    raise BadInput(
        f"data.root: {advice}or set data.root={train or min(roles)} to use that part alone, "
        "of which a fifth is held out for testing"
    )


def is_split(root: Path) -> bool:
    """Whether the folder is split into train and test."""
    try:
        return find_split(root) is not None
    except (BadInput, OSError):
        return False  # the loader says so


def _role(path: Path) -> str | None:
    return next((role for role, name in ROLES.items() if name.fullmatch(path.name)), None)


def _refuse_nested(folders: list[Path]) -> None:
    """Raises BadInput where classes are split into train and test themselves."""
    for folder in folders:
        inner = [path for path in sub_folders(folder) if _role(path)]
        if len({_role(path) for path in inner}) > 1:
            names = " and ".join(legible(path.name) for path in inner)
            raise BadInput(
                f"data.root: {folder} holds the folders {names}, so that images to test on would be trained "
                f"on: set data.root={folder}, or move the images to train and test on into folders of those "
                f"names directly in {folder.parent}"
            )
