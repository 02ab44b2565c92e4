"""The space of a search: an interval or listed values for each swept key."""

import math
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from fedlight.config import SCHEMA_KEYS, WHOLE_KEYS
from fedlight.runtime.errors import BadInput


def read_space(overrides: Sequence[Override], config: DictConfig) -> dict[str, BaseDistribution]:
    """The distribution of each swept key: an interval, log-uniform with tag(log, ...), or listed values.

    Keys are sorted, so that their order on the command line changes no trial.

    Args:
        overrides: of the command; those that sweep no key are left out.
        config: of the sweep, whose defaults tell which other keys take whole numbers.

    Raises:
        BadInput: an interval is invalid.
    """
    swept = [override for override in overrides if override.is_sweep_override()]
    space = {override.get_key_element(): _read_values(override, config) for override in swept}
    return dict(sorted(space.items()))


def _read_values(override: Override, config: DictConfig) -> BaseDistribution:
    values: Any = override.value()
    if not isinstance(values, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    assert values.start is not None
    assert values.end is not None
    low, high, log = values.start, values.end, "log" in values.tags
    typed = f"{override.input_line}"
    if not (math.isfinite(low) and math.isfinite(high) and low <= high and (low > 0 or not log)):
        raise BadInput(f"{typed}: an interval needs two numbers, the lower one first; with log, above 0")
    if not _is_whole(override.key_or_group, low, high, config):
        return FloatDistribution(low, high, log=log)
    if low != int(low) or high != int(high):
        raise BadInput(f"{typed}: {override.key_or_group} takes whole numbers")
    return IntDistribution(int(low), int(high), log=log)


def _is_whole(key: str, low: float, high: float, config: DictConfig) -> bool:
    """Whether an interval is of integers, according to the schema, int(...) or the key's default.

    Hydra parses the bounds of an interval as floats, except in int(...).
    """
    if key in WHOLE_KEYS or (isinstance(low, int) and isinstance(high, int)):
        return True
    if key in SCHEMA_KEYS or low != int(low) or high != int(high):
        return False
    default = OmegaConf.select(config, key)
    return isinstance(default, int) and not isinstance(default, bool)
