"""The user's own code that a cell is built of, and the errors that come out of it."""

import sys
import traceback
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from fedlight.config import CellConfig
from fedlight.runtime.errors import BadInput, format_error

LIBRARIES = ("fedlight", "torch", "diffusers")


def make_extension(group: str, node: dict[str, Any], *arguments: Any, **more: Any) -> Any:
    """Makes what `_target_` of a node names, which may be a user's own; its `name` is for people.

    Raises:
        BadInput: it cannot be made.
    """
    node = {key: value for key, value in node.items() if key != "name"}
    try:
        return instantiate(node, *arguments, **more)
    except HydraException as error:
        if isinstance(error.__cause__, BadInput):
            raise error.__cause__ from None
        raise BadInput(f"{group} {node.get('_target_')}: {format_error(error.__cause__ or error)}") from error


def user_code_error(error: Exception, config: CellConfig) -> str | None:
    """Which code of the user's own raised an error, and what; None where none did."""
    nodes = [
        ("data", config.data.source),
        ("model.unet", config.model.unet),
        ("optimizer", config.optimizer.model_dump(by_alias=True)),
        *(("transform", stage) for stage in (config.transform.up if config.transform else ())),
        ("algorithm", config.algorithm and config.algorithm.model_dump(by_alias=True)),
        ("transport", config.transport and config.transport.model_dump(by_alias=True)),
    ]
    text = "".join(traceback.format_exception(error))  # that of another process is in it as text
    for group, node in nodes:
        target = str((node or {}).get("_target_"))
        file = getattr(sys.modules.get(target.rpartition(".")[0]), "__file__", None)
        if file is not None and target.partition(".")[0] not in LIBRARIES and f'"{file}"' in text:
            return f"{group} {target}: {format_error(error)}"
    return None
