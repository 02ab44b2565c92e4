"""Keys of the configuration in which the cells of a report differ."""

from collections.abc import Collection, Iterable
from typing import Any

from fedlight.reporting import numbers
from fedlight.runs.identity import changes_no_result
from fedlight.runs.status import SweepCell

AXES = ("method.name", "clients", "partition.name")
REPEATED = ("seed", "partition.seed", "trainer.threads", "trainer.accelerator")
"""Keys over which a cell is repeated: they change random draws or rounding, and not the setting."""


def describe_setting(values: dict[str, Any]) -> str:
    """A setting in words, such as `optimizer.lr=0.01`; without what another group's choice leaves out.

    Args:
        values: values of the configuration by key.
    """
    return ", ".join(
        f"{key}={numbers.plain(value)}"
        for key, value in values.items()
        if value is not None or not any(f"{group}.name" in values.keys() - {key} for group in _deciding(key))
    )


def _deciding(key: str) -> tuple[str, ...]:
    """The groups whose choice leaves a key out: a pretrained model comes without the keys of another."""
    group = key.partition(".")[0]
    return (group, "finetuning") if group == "model" else (group,)


def varying_keys(cells: Iterable[SweepCell], others: Collection[str]) -> list[str]:
    """Configuration keys in which cells differ, without those whose values follow from another key's.

    A key that was typed, as a swept one is, follows from none. Only the method's own keys follow from the
    method, and none from the number of clients: cells that also differ in, for example, their rounds are not
    comparable, and the rounds must be shown.

    Args:
        cells: some cells.
        others: keys that are left out.
    """
    cells = list(cells)
    configs = [cell.files.config for cell in cells if cell.files.config]
    typed = {key for cell in cells for key in cell.typed}
    keys = {key for config in configs for key in config if key not in others and not changes_no_result(key)}
    kept: list[str] = []
    for key in sorted(keys, key=lambda key: (not key.endswith(".name"), key.count("."), key)):
        deciding = [*kept, *({f"{key.partition('.')[0]}.name"} - {key})]
        if key.startswith("partition.deal."):
            deciding.append("partition.seed")
        seen: dict[str, str] = {}
        for config in configs:
            value = config.get(key)
            text = repr(None if value is False else value)  # a switch that is off may be left out
            decided_by = () if key in typed else [config.get(k) for k in deciding]
            if seen.setdefault(repr(decided_by), text) != text:
                kept.append(key)
                break
    return kept
