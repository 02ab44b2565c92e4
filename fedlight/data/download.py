"""Downloads a data set's folder if it is missing; an interrupted download leaves no folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from fedlight.runtime.cache import explain_cache
from fedlight.runtime.errors import BadInput
from fedlight.runtime.progress import print_every_minute


def download(folder: Path, fetch: Callable[[str], object], name: str, advice: str) -> None:
    """Downloads `folder` unless it exists.

    Of several processes started at once, one downloads and the others wait for it.

    Args:
        folder: of the data set, in the cache.
        fetch: called with a scratch folder; downloads into it a folder of the same name as `folder`.
        name: of the data set, for messages.
        advice: what to do if the download fails.

    Raises:
        BadInput: the download failed.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if not folder.is_dir():
                for leftover in folder.parent.glob(f".{folder.name}.*/"):  # of processes that were killed
                    shutil.rmtree(leftover)
                with (
                    TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch,
                    print_every_minute(lambda: f"downloading {name}: {_size(scratch):,} bytes so far"),
                ):
                    fetch(scratch)
                    Path(scratch, folder.name).replace(folder)
    except PermissionError as error:
        reason = explain_cache(error, "FEDLIGHT_CACHE")
        raise BadInput(f"{name} cannot be kept in {folder.parent}: {reason}") from error
    except Exception as error:  # each download library has errors of its own
        raise BadInput(
            f"{name} is not in {folder.parent} and could not be downloaded ({error}): {advice}"
        ) from error


def _size(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
