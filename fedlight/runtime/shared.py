"""What many processes need and one makes: files of the cache, whole, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from safetensors import SafetensorError

from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic, explain_cache, remove_unfinished

T = TypeVar("T")


def made_once(path: Path, read: Callable[[Path], T], make: Callable[[Path], object]) -> T:
    """Reads a file of the cache, which is made first where it is absent or cannot be read.

    Of processes started at once, one makes it and the others wait for it. A file that is there needs no
    lock; one that this user may not read is an error, and is left alone.

    Args:
        path: the file; its folder is made where it is absent.
        read: returns what the file holds.
        make: writes the file to the path that it is handed.

    Raises:
        BadInput: the cache cannot be read or written.
    """
    try:
        found = _try(read, path)
        if found is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{path.name}.lock")):
                found = _try(read, path)
                if found is None:
                    remove_unfinished(path)
                    with atomic(path) as temporary:
                        make(temporary)
                    found = read(path)
    except OSError as error:
        raise BadInput(f"the cache cannot be used: {explain_cache(error, 'FEDLIGHT_CACHE')}") from error
    return found


def _try(read: Callable[[Path], T], path: Path) -> T | None:
    try:
        path.open("rb").close()  # libraries' readers do not say that a permission is missing
        return read(path)
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
