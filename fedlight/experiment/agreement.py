"""What institutions agree on: a cell's configuration in one YAML file, without any machine's paths."""

import hashlib
import os
from pathlib import Path
from typing import Any

import yaml

from fedlight.runtime.errors import BadInput

FILE = "cell.yaml"
PLACES = ("root", "cache", "weights")  # keys that each institution has values of its own for


def write_agreement(path: Path, plain: dict[str, Any]) -> None:
    """Writes the configuration of a cell without the paths of this machine."""
    path.write_text(yaml.safe_dump(_placed(plain, dict.fromkeys(PLACES)), sort_keys=False))


def agreed_hash(path: Path) -> str:
    """SHA-256 of the file, as `sha256sum` prints it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def read_agreement(path: Path, root: str | None) -> dict[str, Any]:
    """The configuration with this machine's paths: `data.root`, and the cache of FEDLIGHT_CACHE.

    Raises:
        BadInput: the file is not there, or is no configuration.
    """
    cache = os.environ.get("FEDLIGHT_CACHE") or str(Path.home() / ".cache" / "fedlight")
    try:
        plain = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(plain, dict):
        raise BadInput(f"{path} holds no configuration")
    weights = os.environ.get("FEDLIGHT_INCEPTION")
    found: dict[str, Any] = _placed(plain, {"root": root, "cache": cache, "weights": weights})
    return found


def _placed(node: Any, places: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return {
            key: places.get(key, _placed(value, places)) if key in places else _placed(value, places)
            for key, value in node.items()
        }
    return node
