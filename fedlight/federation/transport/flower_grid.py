"""Messages over Flower's grid, the connection of a ServerApp to its nodes."""

from collections.abc import Iterable
from typing import Any


class FlowerGrid:
    """Sends messages to nodes and collects the replies.

    Args:
        grid: of Flower.
        timeout: seconds after which Flower discards a message without a reply.
    """

    def __init__(self, grid: Any, timeout: float) -> None:
        self._grid = grid
        self._timeout = timeout

    def find_nodes(self) -> dict[int, bytes]:
        """The nodes that are online: their public keys in PEM."""
        return {node.node_id: bytes(node.public_key) for node in self._grid.get_nodes()}

    def send(self, kind: str, node: int, content: Any, group: str) -> str | None:
        """Sends a message to a node; returns the id of the message, or None where it cannot be sent."""
        from flwr.app import Message

        message = Message(content, node, kind, ttl=self._timeout, group_id=group)
        (number,) = list(self._grid.push_messages([message])) or [None]
        return number

    def pull(self, numbers: Iterable[str]) -> list[Any]:
        """The replies that have arrived to messages with these ids."""
        expected = list(numbers)
        return list(self._grid.pull_messages(expected)) if expected else []
