"""A cell's identity, its folder, and the result that says it is done."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from fedlight.runs.checksums import lost_file
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic, naming

SCHEMA = 1
NEUTRAL_GROUPS = ("name", "output", "logger", "transport")
NEUTRAL = {"root", "cache", "weights", "workers"}
"""Groups, and keys of any group, that say where things are, or are done, and change no result."""


def cell_id(config: dict[str, Any]) -> str:
    """A readable name that ends in a hash of everything that can change the result.

    Args:
        config: the checked configuration; what changes no result does not count.
    """
    counted = {key: value for key, value in config.items() if key not in NEUTRAL_GROUPS}
    content = json.dumps(_without_neutral(counted), sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
    parts = (
        config["method"]["name"],
        f"K{config['clients']}",
        config["data"]["name"],
        config["partition"]["name"],
        config["model"]["name"],
        f"R{config['rounds']}",
        f"E{config['epochs']}",
        f"s{config['seed']}",
        digest,
    )
    return "-".join(re.sub(r"[^\w.+]", "_", part) for part in parts)


def changes_no_result(key: str) -> bool:
    """Whether a dotted key of the configuration, such as `data.root`, counts in no cell's id."""
    parts = key.split(".")
    return parts[0] in NEUTRAL_GROUPS or not NEUTRAL.isdisjoint(parts)


def cell_folder(settings: Any) -> Path:
    """Where the cell of the checked configuration (`CellConfig`) lives."""
    config = settings.plain()
    return Path(config["output"]) / config["name"] / cell_id(config)


def is_done(folder: Path) -> bool:
    """Whether the cell of this folder is completed, and what it must still hold is whole."""
    return (read_result(folder) or {}).get("status") == "completed" and lost_file(folder) is None


def tell_done(folder: Path) -> None:
    """Says that the cell of this folder is skipped, since it is done."""
    print(f"{folder.name}: done already, in {folder}")


def _without_neutral(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_neutral(value) for key, value in node.items() if key not in NEUTRAL}
    return node


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Writes the resolved configuration as YAML."""
    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """What `write_config` wrote, or what somebody put in its place.

    Raises:
        BadInput: the file cannot be read, or holds no configuration.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path} holds no configuration")
    return config


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes `result.json`, the last file of a cell."""
    with atomic(folder / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The cell's result, or None where there is none, or none that can be understood."""
    path = folder / "result.json"
    try:
        with naming(path):
            result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return result if isinstance(result, dict) else None
