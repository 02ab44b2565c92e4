"""The identity of a cell: its id, its folder, its configuration and result on disk."""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from fedlight.runs.checksums import find_lost_file
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic, naming
from fedlight.runtime.untrusted import read_yaml

SCHEMA = 1
NEUTRAL_GROUPS = ("name", "output", "logger", "transport")
PLACES = (
    "data.root",
    "data.path",
    "data.cache",
    "data.source.root",
    "data.source.cache",
    "evaluation.weights",
    "evaluation.cache",
    "finetuning.pretrained",
)
"""Keys whose values are paths on one machine."""
NEUTRAL = frozenset({*PLACES, "trainer.workers", "evaluation.background"})
"""Dotted keys that change no result; other keys that end in the same word count in the id."""


def cell_id(config: dict[str, Any]) -> str:
    """A readable name that ends in a hash of all keys that can change the result.

    Args:
        config: the validated configuration.
    """
    counted = {key: value for key, value in config.items() if key not in NEUTRAL_GROUPS}
    content = json.dumps(drop_keys(counted, NEUTRAL), sort_keys=True)
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
    """Whether a dotted key of the configuration, such as `data.root`, is not part of a cell's id."""
    return key.partition(".")[0] in NEUTRAL_GROUPS or key in NEUTRAL


def cell_folder(config: Any) -> Path:
    """The folder of the cell with a validated configuration (`CellConfig`)."""
    plain = config.plain()
    return Path(plain["output"]) / plain["name"] / cell_id(plain)


def is_done(folder: Path) -> bool:
    """Whether the cell in a folder is completed and its files are intact."""
    return (read_result(folder) or {}).get("status") == "completed" and find_lost_file(folder) is None


def print_done(folder: Path) -> None:
    """Prints that the cell in a folder is skipped, since it is done."""
    print(f"{folder.name}: done already, in {folder}")


def drop_keys(node: Any, keys: Collection[str], prefix: str = "") -> Any:
    """A copy of a configuration without some dotted keys, such as `data.root`."""
    if not isinstance(node, dict):
        return node
    return {
        key: drop_keys(value, keys, f"{prefix}{key}.")
        for key, value in node.items()
        if f"{prefix}{key}" not in keys
    }


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Writes the resolved configuration as YAML."""
    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """Reads the configuration of a cell; the file is untrusted.

    Raises:
        BadInput: the file cannot be read, or is no mapping.
    """
    try:
        config = read_yaml(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path} holds no configuration")
    return config


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes `result.json`, the last file of a cell."""
    with atomic(folder / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The cell's result; None if it is missing or cannot be parsed."""
    path = folder / "result.json"
    try:
        with naming(path):
            result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None


def last_round(result: dict[str, Any], rounds: int) -> int:
    """The last round of a completed cell: R, or the round after which it was stopped early.

    Args:
        result: of the cell, untrusted.
        rounds: R.
    """
    stopped = result.get("stopped")
    round_ = stopped.get("round") if isinstance(stopped, dict) else None
    return round_ if isinstance(round_, int) else rounds
