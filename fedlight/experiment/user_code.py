"""Errors that come out of a user's own code: which part of the configuration names that code."""

import sys
import traceback
from typing import Any

from fedlight.config import CellConfig
from fedlight.runtime.errors import format_error

LIBRARIES = ("fedlight", "torch", "diffusers")


def user_code_error(error: Exception, config: CellConfig) -> str | None:
    """A message that names the user's own code which raised an error; None where none did."""
    text = "".join(traceback.format_exception(error))  # the traceback of another process is in it as text
    for key, target in _targets(config.plain()):
        file = getattr(sys.modules.get(target.rpartition(".")[0]), "__file__", None)
        if file is not None and target.partition(".")[0] not in LIBRARIES and f'"{file}"' in text:
            return f"{key} {target}: {format_error(error)}"
    return None


def _targets(node: Any, key: str = "") -> list[tuple[str, str]]:
    """The dotted key and the `_target_` of each node of a configuration that has one, outermost first."""
    if isinstance(node, list):
        return [target for item in node for target in _targets(item, key)]
    if not isinstance(node, dict):
        return []
    inner = [
        target for name, value in node.items() for target in _targets(value, f"{key}.{name}".lstrip("."))
    ]
    return [(key, str(node["_target_"])), *inner] if "_target_" in node else inner
