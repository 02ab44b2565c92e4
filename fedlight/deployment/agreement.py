"""What institutions agree on: a cell's configuration in one YAML file, without any machine's paths."""

import hashlib
import os
from pathlib import Path
from typing import Any

from fedlight.evaluation.weights import given_weights
from fedlight.runs.identity import PLACES, read_config, write_config
from fedlight.runtime.errors import BadInput
from fedlight.runtime.secret import masked

FILE = "cell.yaml"


def write_agreement(path: Path, plain: dict[str, Any]) -> None:
    """Writes the configuration of a cell without the paths of this machine and without secrets."""
    write_config(path, masked(_with_paths(plain, dict.fromkeys(PLACES))))


def hash_agreement(path: Path) -> str:
    """SHA-256 of the file, as `sha256sum` prints it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def check_agreed(path: Path, sha256: str) -> None:
    """Raises BadInput where the file has another SHA-256 than the agreed one."""
    if (received := hash_agreement(path)) != sha256:
        raise BadInput(f"{path} has the SHA-256 {received}, and {sha256} was agreed")


def read_agreement(path: Path, root: str | None) -> dict[str, Any]:
    """The configuration with this machine's paths: of its images, of FEDLIGHT_CACHE and FEDLIGHT_PRETRAINED.

    Args:
        path: of the agreement.
        root: the folder of this machine's images, `data.root` or `data.path`; None for none.

    Raises:
        BadInput: the file is missing, or is no configuration.
    """
    cache = os.environ.get("FEDLIGHT_CACHE") or str(Path.home() / ".cache" / "fedlight")
    agreed = read_config(path)
    section = agreed.get("evaluation")
    extractor = section.get("extractor") if isinstance(section, dict) else None
    weights = given_weights(str(extractor))
    folder = root and os.path.expanduser(root)
    pretrained = os.environ.get("FEDLIGHT_PRETRAINED")
    local = {"root": folder, "path": folder, "cache": cache, "weights": weights, "pretrained": pretrained}
    paths = {key: local[key.rpartition(".")[2]] for key in PLACES}
    config: dict[str, Any] = _with_paths(agreed, paths)
    return config


def _with_paths(node: Any, paths: dict[str, Any], prefix: str = "") -> Any:
    """A configuration in which the values of the dotted keys `paths` are replaced, where it has them."""
    if not isinstance(node, dict):
        return node
    return {
        key: paths.get(f"{prefix}{key}", _with_paths(value, paths, f"{prefix}{key}."))
        for key, value in node.items()
    }
