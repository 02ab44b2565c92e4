"""What `--help` prints: every key with its meaning and every choice, from the comments in configs/."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from fedlight.config_errors import GLOBAL_GROUPS

KEY = re.compile(r"^( *)([\w/]+):(?: +[^#\s].*?)?(?: +# (.*))?$")
HIDDEN = ("defaults", "hydra")
WIDTH = 30  # of the column of keys, in characters


def format_manual(root: Path) -> str:
    """The text of `--help`.

    Args:
        root: of the folders configs and sweeps.
    """
    config = root / "configs" / "config.yaml"
    defaults = [
        entry for entry in yaml.safe_load(config.read_text(encoding="utf-8"))["defaults"] if entry != "_self_"
    ]
    chosen = {group.split()[-1]: choice for entry in defaults for group, choice in entry.items()}
    lines = ["Keys, KEY=VALUE:", *_entries(read_keys(config, ""))]
    for group, files in list_groups(root).items():
        lines += ["", f"{group}=..." + (f" (default: {chosen[group]})" if chosen.get(group) else "")]
        lines += _entries((f"  {file.stem}", _meaning(file)) for file in files)
        lines += _entries(_keys_of(group, files).items())
    return "\n".join(lines)


def list_overrides(root: Path) -> list[str]:
    """What may be typed as an override: KEY= and GROUP=CHOICE."""
    overrides = [f"{key}=" for key, _ in read_keys(root / "configs" / "config.yaml", "")]
    for group, files in list_groups(root).items():
        overrides += [f"{group}={file.stem}" for file in files]
        overrides += [f"{key}=" for key in _keys_of(group, files)]
    return overrides


def list_groups(root: Path) -> dict[str, list[Path]]:
    """The files of each group, in order."""
    configs = root / "configs"
    folders = [path for path in sorted(configs.iterdir()) if path.is_dir() and path.name != "hydra"]
    places = {path.name: path for path in [*folders, root / "sweeps"]}
    places |= {f"hydra/{name}": configs / "hydra" / name for name in ("launcher", "sweeper")}
    return {group: sorted(folder.glob("*.yaml")) for group, folder in places.items()}


def read_keys(file: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """The dotted keys of a file and the comments beside them.

    Args:
        file: a YAML file of configs/.
        prefix: of every key, such as `data.`.
    """
    parents: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not (match := KEY.match(line)):
            continue
        indent, name, meaning = match.groups()
        parents = [*parents[: len(indent) // 2], name]
        if parents[0] not in HIDDEN and name[0] != "_" and meaning:
            yield f"{prefix}{'.'.join(parents)}", meaning


def _keys_of(group: str, files: Iterable[Path]) -> dict[str, str]:
    """The keys of a group and their meanings, each once."""
    if group in GLOBAL_GROUPS:
        return {}
    prefix = f"{group.replace('/', '.')}."
    return {key: meaning for file in reversed(list(files)) for key, meaning in read_keys(file, prefix)}


def _meaning(file: Path) -> str:
    """The first comment of a file, without its name."""
    comment = next(
        line for line in file.read_text(encoding="utf-8").splitlines() if line[:2] == "# " and line[2] != "@"
    )
    return comment[2:].removeprefix(f"{file.stem}: ")


def _entries(entries: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {key:{WIDTH}} {meaning}" for key, meaning in entries]
