"""Several loggers in one section of the configuration."""

from typing import Any


def split_loggers(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The section of each logger by its dotted key, such as `logger` or `logger.tensorboard`."""
    mappings = {key: value for key, value in node.items() if isinstance(value, dict)}
    inner = {key: value for key, value in mappings.items() if value.get("_target_") is not None}
    outer = {key: value for key, value in node.items() if key not in inner}
    sections = {f"logger.{key}": value for key, value in inner.items()}
    return ({"logger": outer} if outer.get("_target_") is not None else {}) | sections
