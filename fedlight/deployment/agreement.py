"""What institutions agree on: a cell's configuration in one YAML file, without any machine's paths."""

import hashlib
import os
from pathlib import Path
from typing import Any

from fedlight.runs.identity import PLACES, read_config, write_config
from fedlight.runtime.errors import BadInput
from fedlight.runtime.secret import masked

FILE = "cell.yaml"


def write_agreement(path: Path, plain: dict[str, Any]) -> None:
    """Writes the configuration of a cell without the paths of this machine and without secrets."""
    write_config(path, masked(_placed(plain, dict.fromkeys(PLACES))))


def agreed_hash(path: Path) -> str:
    """SHA-256 of the file, as `sha256sum` prints it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def check_agreed(path: Path, agreed_to: str) -> None:
    """Raises BadInput where the file is not the one of that SHA-256."""
    if (found := agreed_hash(path)) != agreed_to:
        raise BadInput(f"{path} has the SHA-256 {found}, and {agreed_to} was agreed")


def read_agreement(path: Path, root: str | None) -> dict[str, Any]:
    """The configuration with this machine's paths: `data.root`, and the cache of FEDLIGHT_CACHE.

    Raises:
        BadInput: the file is not there, or is no configuration.
    """
    cache = os.environ.get("FEDLIGHT_CACHE") or str(Path.home() / ".cache" / "fedlight")
    weights = os.environ.get("FEDLIGHT_INCEPTION")
    here = {"root": root and os.path.expanduser(root), "cache": cache, "weights": weights}
    found: dict[str, Any] = _placed(read_config(path), {key: here[key.rpartition(".")[2]] for key in PLACES})
    return found


def _placed(node: Any, places: dict[str, Any], prefix: str = "") -> Any:
    """A configuration with other values under those of the dotted keys `places` that it has."""
    if not isinstance(node, dict):
        return node
    return {
        key: places.get(f"{prefix}{key}", _placed(value, places, f"{prefix}{key}."))
        for key, value in node.items()
    }
