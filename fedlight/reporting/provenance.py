"""The provenance of a report: configurations, versions of libraries, machines."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import yaml

from fedlight.reporting import numbers
from fedlight.reporting.setting_keys import AXES, varying_keys
from fedlight.runs.identity import PLACES
from fedlight.runs.status import SweepCell


@dataclass(frozen=True)
class Provenance:
    """What is needed to run the cells again.

    Attributes:
        shared: the keys on which all cells agree, as YAML, without paths of the machine.
        changing: key and the values that it takes, where no other key decides them.
        versions: library and the versions that cells ran under, with the number of cells each.
        machines: description and number of cells.
    """

    shared: str
    changing: list[tuple[str, str]]
    versions: list[tuple[str, str]]
    machines: list[tuple[str, int]]


def trace(cells: list[SweepCell]) -> Provenance:
    """Gathers the provenance of all cells."""
    configs = [cell.files.config for cell in cells if cell.files.config]
    results = [cell.files.result for cell in cells if cell.files.result]
    shared: dict[str, Any] = {}
    changing = []
    named = {*AXES, *varying_keys(cells, AXES)}
    for key in sorted({key for config in configs for key in config}.difference(PLACES)):
        values = Counter(numbers.plain(config.get(key)) for config in configs)
        if len(values) == 1:
            shared[key] = configs[0].get(key)
        elif key in named:
            changing.append((key, _listed(values)))
    libraries = sorted({name for result in results for name in result.versions})
    versions = [
        (name, _listed(Counter(result.versions.get(name, "not recorded") for result in results)))
        for name in libraries
    ]
    machines = Counter(
        ", ".join(f"{key} {value}" for key, value in result.machine.items() if value is not None)
        or "not recorded"
        for result in results
    )
    return Provenance(yaml.safe_dump(shared, sort_keys=True), changing, versions, machines.most_common())


def _listed(values: Counter[str]) -> str:
    """One value by itself, several with the number of cells each."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count})" for value, count in values.most_common(12)) + (
        f" and {len(values) - 12} more" if len(values) > 12 else ""
    )
