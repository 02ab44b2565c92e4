"""A pickle that makes a folder where it is loaded."""

import os
from collections.abc import Callable
from pathlib import Path


class Trap:
    """Leaves a folder behind where a pickle of it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)
