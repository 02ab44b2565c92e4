"""Where the weights of the inception extractor are: by path, in a cache, or downloaded."""

import hashlib
from functools import cache as remembered
from pathlib import Path

from fedlight.runtime.errors import BadInput
from fedlight.runtime.shared import made_once

FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it


@remembered
def weights_name(extractor: str, path: str | None) -> str | None:
    """What weights of the user's own are called in a cell's identity, wherever they lie; None for none."""
    if extractor != "inception" or path is None or not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def find_weights(path: str | None, cache: str) -> Path:
    """The file of Inception's weights in torch-fidelity's layout (`inception-v3-compat`).

    Args:
        path: of a file of the user's own, or None: fedlight's cache, the cache of torch.hub, a download.
        cache: fedlight's cache folder, where downloads go.

    Raises:
        BadInput: there is no such file, and none can be downloaded.
    """
    import torch.hub

    if path is not None:
        if not Path(path).is_file():
            raise BadInput(f"evaluation.weights: no file {path}")
        return Path(path)
    own = Path(cache) / FILE
    for place in (own, Path(torch.hub.get_dir()) / "checkpoints" / FILE):
        if place.is_file():
            return place
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    def download(temporary: Path) -> None:
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(temporary), progress=False)
        except Exception as error:  # urllib, sockets and torch.hub have errors of their own
            raise BadInput(
                f"evaluation.extractor=inception needs {own}, which could not be downloaded ({error}): run "
                "python -m fedlight.prepare evaluation.extractor=inception where there is internet, or fetch "
                f"{URL_INCEPTION_V3} and set evaluation.weights=FILE"
            ) from error

    def present(place: Path) -> Path:
        if not place.is_file():
            raise FileNotFoundError(place)
        return place

    return made_once(own, present, download)
