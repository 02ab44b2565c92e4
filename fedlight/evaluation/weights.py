"""Where the weights of the inception extractor are: by path, in a cache, or downloaded."""

import sys
from functools import cache as remembered
from functools import partial
from math import ceil
from pathlib import Path
from urllib.request import urlopen

from fedlight.runtime.cache import explain_cache, load_or_make
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import file_sha256
from fedlight.runtime.progress import track

FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it
MIB = 2**20  # bytes


@remembered
def weights_name(extractor: str, path: str | None) -> str | None:
    """What weights of the user's own are called in a cell's identity, wherever they lie; None for none."""
    if extractor != "inception" or path is None or not Path(path).is_file():
        return None
    return file_sha256(Path(path))[:8]


def find_weights(path: str | None, cache: str) -> Path:
    """The file of Inception's weights in torch-fidelity's layout (`inception-v3-compat`).

    Args:
        path: of a file of the user's own, or None: fedlight's cache, the cache of torch.hub, a download,
            where a file counts if its SHA-256 begins as its name says; else it is downloaded.
        cache: fedlight's cache folder, where downloads go.

    Raises:
        BadInput: there is no such file, and none can be downloaded.
    """
    if path is not None and not Path(path).is_file():
        raise BadInput(f"evaluation.weights: no file {path}")
    try:
        found = present_weights(path, cache)
    except PermissionError as error:
        keys = "evaluation.weights or FEDLIGHT_CACHE"
        raise BadInput(f"evaluation.extractor=inception: {explain_cache(error, keys)}") from error
    if found is not None:
        return found
    own = Path(cache) / FILE
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    def download(temporary: Path) -> None:
        for _ in range(2):
            try:
                _fetch(URL_INCEPTION_V3, temporary)
                return
            except Exception as error:  # urllib, http and sockets have errors of their own
                reason = " ".join(str(error).split())
        raise BadInput(
            f"evaluation.extractor=inception needs {own}, which could not be downloaded ({reason}): run "
            "python -m fedlight.prepare evaluation.extractor=inception where there is internet, or fetch "
            f"{URL_INCEPTION_V3} and set evaluation.weights=FILE"
        )

    def whole(place: Path) -> Path:
        if not _is_whole(place):
            raise FileNotFoundError(place)
        return place

    return load_or_make(own, whole, download)


def _fetch(url: str, path: Path) -> None:
    """Downloads the weights to a path and tells how far it has come.

    Raises:
        OSError: not reached, or what came is not what the name of the file promises.
    """
    with urlopen(url) as response, path.open("wb") as file:
        length = response.headers["Content-Length"]  # not every server tells it
        size = int(length) / MIB if length else None
        message = f", {size:.1f} MiB" if size else ""
        print(f"fedlight: downloading {url}{message}", file=sys.stderr)
        blocks = iter(partial(response.read, MIB), b"")
        for block in track(blocks, "downloading Inception's weights (MiB)", ceil(size) if size else None):
            file.write(block)
    if not _has_promised_hash(path):
        raise OSError(f"what came has the SHA-256 {file_sha256(path)}")


def present_weights(path: str | None, cache: str) -> Path | None:
    """The file that `find_weights` returns without a download; None where there is none."""
    import torch.hub

    if path is not None:
        return Path(path) if Path(path).is_file() else None
    places = (Path(cache) / FILE, Path(torch.hub.get_dir()) / "checkpoints" / FILE)
    return next(filter(_is_whole, places), None)


def _is_whole(path: Path) -> bool:
    return path.is_file() and _has_promised_hash(path)


def _has_promised_hash(path: Path) -> bool:
    """Whether the SHA-256 of a file begins as the name of the weights says."""
    return file_sha256(path).startswith(FILE.rpartition("-")[2].partition(".")[0])
