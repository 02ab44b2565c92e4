"""The names that runs of a logger are grouped by."""

from typing import Any


def with_setting(parameters: dict[str, Any]) -> dict[str, Any]:
    """A configuration with `setting`: the names that runs are grouped by, `none` if a group is not chosen."""
    groups = ("method", "data", "partition", "model", "algorithm", "transform")
    setting = {key: str(parameters.get(key, {}).get("name", "none")) for key in groups}
    return {**parameters, "setting": setting}
