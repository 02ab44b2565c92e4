"""What a sweep set out to run, as Hydra wrote it down in `multirun.yaml`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlight.reporting.records import YAML_LOADER


@dataclass(frozen=True)
class Axes:
    """The values of each axis of a grid."""

    method: frozenset[str]
    clients: frozenset[int]
    partition: frozenset[str]
    data: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """The last multirun of a sweep's folder: the command, and its grid where it can be told."""

    command: str
    axes: Axes | None


def read_plan(sweep: Path) -> Plan | None:
    """The plan of the last multirun that wrote into the folder; None where there is none that can be read."""
    try:
        config = yaml.load((sweep / "multirun.yaml").read_text(), YAML_LOADER)
        overrides = config["hydra"]["overrides"]
        typed = [o for o in (*overrides["task"], *overrides["hydra"]) if o != "hydra.mode=MULTIRUN"]
        command = f"python -m fedlight.run -m {shlex.join(typed)}".rstrip()
        swept = config["hydra"]["sweeper"].get("params") or {}
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
    return Plan(command, _axes(config, [*(f"{k}={v}" for k, v in swept.items()), *overrides["task"]]))


def _axes(config: dict[str, Any], overrides: list[str]) -> Axes | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        values = {
            "method": {str(config["method"]["name"])},
            "clients": {str(config["clients"])},
            "partition": {str(config["partition"]["name"])},
            "data": {str(config["data"]["name"])},
        }
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.is_sweep_override() and override.key_or_group in values:
                values[override.key_or_group] = set(override.sweep_string_iterator())
        clients = frozenset(int(value) for value in values.pop("clients"))
    except (HydraException, KeyError, TypeError, ValueError):
        return None
    return Axes(clients=clients, **{key: frozenset(names) for key, names in values.items()})
