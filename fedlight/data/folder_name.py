"""What a folder of images is called, so that two folders are two cells wherever they lie."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def folder_name(root: str | None, default: str) -> str:
    """The folder's name and a hash of what it holds: the relative paths and sizes of its files.

    Args:
        root: the folder, or None.
        default: the answer where there is no such folder.
    """
    folder = Path(str(root)).absolute()
    if root is None or not folder.is_dir():
        return default
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\n".encode())
    return f"{folder.name}_{digest.hexdigest()}"
