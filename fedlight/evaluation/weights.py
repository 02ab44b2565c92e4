"""The file of the Inception extractor's weights: given by path, cached, or downloaded."""

import sys
from functools import cache as remembered
from pathlib import Path

from fedlight.runtime.cache import explain_cache, load_or_make
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import file_sha256
from fedlight.runtime.progress import print_every_minute

FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it: -START OF THE SHA-256


@remembered
def weights_name(extractor: str, path: str | None) -> str | None:
    """The start of the SHA-256 of the user's own weights, which is part of the cell's id; None without."""
    if extractor != "inception" or path is None or not Path(path).is_file():
        return None
    return file_sha256(Path(path))[:8]


def find_weights(path: str | None, cache: str) -> Path:
    """The file of Inception's weights in torch-fidelity's layout (`inception-v3-compat`).

    Args:
        path: of the user's own file, or None: the file in fedlight's cache, in torch.hub's cache, or a
            download into fedlight's cache. A cached file is used only if its SHA-256 begins as its name says.
        cache: fedlight's cache folder.

    Raises:
        BadInput: there is no such file, and none can be downloaded.
    """
    if path is not None and not Path(path).is_file():
        raise BadInput(f"evaluation.weights: no file {path}")
    try:
        present = present_weights(path, cache)
    except PermissionError as error:
        keys = "evaluation.weights or FEDLIGHT_CACHE"
        raise BadInput(f"evaluation.extractor=inception: {explain_cache(error, keys)}") from error
    if present is not None:
        return present
    cached = Path(cache) / FILE
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    def download(temporary: Path) -> None:
        print(f"fedlight: downloading {URL_INCEPTION_V3}", file=sys.stderr)
        for _ in range(2):
            try:
                _fetch(URL_INCEPTION_V3, temporary)
                return
            except Exception as error:  # urllib, http and sockets have errors of their own
                reason = " ".join(str(error).split())
        raise BadInput(
            f"evaluation.extractor=inception needs {cached}, which could not be downloaded ({reason}): run "
            "python -m fedlight.prepare evaluation.extractor=inception where there is internet, or fetch "
            f"{URL_INCEPTION_V3} and set evaluation.weights=FILE"
        )

    def check(file: Path) -> Path:
        if not _is_intact(file):
            raise FileNotFoundError(file)
        return file

    return load_or_make(cached, check, download)


def present_weights(path: str | None, cache: str) -> Path | None:
    """The file that `find_weights` returns without a download; None where there is none."""
    import torch.hub

    if path is not None:
        return Path(path) if Path(path).is_file() else None
    candidates = (Path(cache) / FILE, Path(torch.hub.get_dir()) / "checkpoints" / FILE)
    return next(filter(_is_intact, candidates), None)


def _fetch(url: str, path: Path) -> None:
    """Downloads a file whose SHA-256 begins as FILE says.

    Raises:
        Exception: the server was not reached, or the file has another hash.
    """
    import torch.hub

    def progress() -> str:
        size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
        return f"downloading Inception's weights: {size:,} bytes so far"

    with print_every_minute(progress):
        torch.hub.download_url_to_file(url, str(path), _hash_prefix(), progress=sys.stderr.isatty())


def _is_intact(path: Path) -> bool:
    """Whether the file exists and its SHA-256 begins as FILE says."""
    return path.is_file() and file_sha256(path).startswith(_hash_prefix())


def _hash_prefix() -> str:
    """The start of the SHA-256 in FILE."""
    return Path(FILE).stem.rpartition("-")[2]
