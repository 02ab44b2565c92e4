"""Makes what a `_target_` of the configuration names, which may be a user's own class or function."""

from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from fedlight.runtime.errors import BadInput, format_error


def make_extension(group: str, node: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
    """Calls what `_target_` of a node names, with the node's other keys as arguments.

    Args:
        group: of the configuration, for messages.
        node: has `_target_`; its `name` is for people and no argument.
        arguments, keywords: further arguments.

    Raises:
        BadInput: the call failed; the message names the group, the target and the error.
    """
    node = {key: value for key, value in node.items() if key != "name"}
    try:
        return instantiate(node, *arguments, **keywords)
    except HydraException as error:
        if isinstance(error.__cause__, BadInput):
            raise error.__cause__ from None
        raise BadInput(f"{group} {node.get('_target_')}: {format_error(error.__cause__ or error)}") from error
