"""The files of the pretrained extractors' weights: given by path, cached, or downloaded."""

import os
import sys
from functools import cache as remembered
from pathlib import Path
from typing import NamedTuple

from fedlight.runtime.cache import explain_cache, load_or_make
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import file_sha256
from fedlight.runtime.progress import print_every_minute


class Published(NamedTuple):
    """A published file of weights.

    Attributes:
        file: its name in fedlight's cache and in torch.hub's.
        url: where to download it.
        sha256: of its bytes, complete.
    """

    file: str
    url: str
    sha256: str


CLIP_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
PUBLISHED = {
    "inception": Published(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "dinov2": Published(
        "dinov2_vitl14_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
    "clip": Published(
        f"clip-vit-b-32-{CLIP_SHA256}.pt",
        f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-32.pt",
        CLIP_SHA256,
    ),
}
"""Pretrained extractor -> the weights that it has unless others are given. The files are those that
torch-fidelity downloads, under the names that it gives them."""


def given_weights(extractor: str) -> str | None:
    """The user's own file of weights by the environment, such as FEDLIGHT_DINOV2 for dinov2; None without."""
    return os.environ.get(f"FEDLIGHT_{extractor.upper()}") if extractor in PUBLISHED else None


@remembered
def weights_name(extractor: str, path: str | None) -> str | None:
    """The start of the SHA-256 of the user's own weights, which is part of the cell's id; None without."""
    if extractor not in PUBLISHED or path is None or not Path(path).is_file():
        return None
    return file_sha256(Path(path))[:8]


def find_weights(extractor: str, path: str | None, cache: str) -> Path:
    """The file of a pretrained extractor's weights.

    Args:
        extractor: a key of PUBLISHED.
        path: of the user's own file, or None: the published file in fedlight's cache, in torch.hub's cache,
            or a download into fedlight's cache. A cached file is used only if it has the published
            SHA-256.
        cache: fedlight's cache folder.

    Raises:
        BadInput: there is no such file, and none can be downloaded.
    """
    if path is not None and not Path(path).is_file():
        raise BadInput(f"evaluation.weights: no file {path}")
    try:
        present = present_weights(extractor, path, cache)
    except PermissionError as error:
        keys = "evaluation.weights or FEDLIGHT_CACHE"
        raise BadInput(f"evaluation.extractor={extractor}: {explain_cache(error, keys)}") from error
    if present is not None:
        return present
    published = PUBLISHED[extractor]
    cached = Path(cache) / published.file

    def download(temporary: Path) -> None:
        print(f"fedlight: downloading {published.url}", file=sys.stderr)
        for _ in range(2):
            try:
                _fetch(extractor, temporary)
                return
            except Exception as error:  # urllib, http and sockets have errors of their own
                reason = " ".join(str(error).split())
        raise BadInput(
            f"evaluation.extractor={extractor} needs {cached}, which could not be downloaded ({reason}): run "
            f"python -m fedlight.prepare evaluation.extractor={extractor} where there is internet, or fetch "
            f"{published.url} and set evaluation.weights=FILE"
        )

    def check(file: Path) -> Path:
        if not _is_intact(file, published.sha256):
            raise FileNotFoundError(file)
        return file

    return load_or_make(cached, check, download)


def present_weights(extractor: str, path: str | None, cache: str) -> Path | None:
    """The file that `find_weights` returns without a download; None where there is none."""
    import torch.hub

    if path is not None:
        return Path(path) if Path(path).is_file() else None
    file, _, sha256 = PUBLISHED[extractor]
    candidates = (Path(cache) / file, Path(torch.hub.get_dir()) / "checkpoints" / file)
    return next((path for path in candidates if _is_intact(path, sha256)), None)


def _fetch(extractor: str, path: Path) -> None:
    """Downloads a published file.

    Raises:
        Exception: the server was not reached, or the file has another hash.
    """
    import torch.hub

    def progress() -> str:
        size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
        return f"downloading the weights of {extractor}: {size:,} bytes so far"

    _, url, sha256 = PUBLISHED[extractor]
    with print_every_minute(progress):
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())


def _is_intact(path: Path, sha256: str) -> bool:
    """Whether the file exists and has the SHA-256."""
    return path.is_file() and file_sha256(path) == sha256
