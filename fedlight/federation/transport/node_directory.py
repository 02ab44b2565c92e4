"""The directory of nodes: which client number a node of the federation has."""

import sys
import time
from typing import Any

from fedlight.federation.transport.flower_grid import FlowerGrid
from fedlight.federation.transport.node_keys import NodeKeys

HELLO = "query"  # type of Flower's message
AGAIN = 60.0  # seconds between two queries to a node that was refused


class NodeDirectory:
    """Asks each new node for its client number, and refuses nodes that may not have it.

    A node is refused where its key is not that of the client, where it has not agreed to the configuration,
    or where another node that is online has the number.

    Args:
        grid: of the nodes.
        keys: of the clients.
        agreed: SHA-256 of the configuration that every institution agreed to.
    """

    def __init__(self, grid: FlowerGrid, keys: NodeKeys, agreed: str) -> None:
        self._grid = grid
        self._keys = keys
        self._agreed = agreed
        self._nodes: dict[int, int] = {}  # client: node
        self._queries: dict[int, str] = {}  # node: id of the query that waits for its reply
        self._refused: dict[int, float] = {}  # node: time of the next query

    @property
    def is_asking(self) -> bool:
        """Whether a node has not answered yet."""
        return bool(self._queries)

    def node_of(self, client: int) -> int | None:
        """The node that the client last had; it may be offline."""
        return self._nodes.get(client)

    def update(self, online: dict[int, bytes]) -> None:
        """Asks nodes that are new, and reads the answers.

        Args:
            online: the nodes that are online, with their public keys.
        """
        from fedlight.federation.transport.envelope import wrap

        now = time.monotonic()
        self._queries = {node: query for node, query in self._queries.items() if node in online}
        self._refused = {node: until for node, until in self._refused.items() if now < until}
        known = {*self._nodes.values(), *self._queries, *self._refused}
        for node in online.keys() - known:
            if number := self._grid.send(HELLO, node, wrap(b"", {}), "hello"):
                self._queries[node] = number
        for reply in self._grid.pull(self._queries.values()):
            number = reply.metadata.reply_to_message_id  # an error reply does not name the node as its source
            node = next(node for node, query in self._queries.items() if query == number)
            del self._queries[node]
            if refusal := self._register(node, reply, online):
                self._refused[node] = now + AGAIN
                print(f"fedlight: node {node} {refusal}: refused", file=sys.stderr)

    def _register(self, node: int, reply: Any, online: dict[int, bytes]) -> str | None:
        """Gives a node the client number of its reply, or returns why it is refused."""
        from fedlight.federation.transport.envelope import CLIENT, HASH, PROBLEM, open_words

        words = open_words(reply.content) if reply.has_content() else {}
        client = words.get(CLIENT)
        if PROBLEM in words or not isinstance(client, int):
            return f"cannot take part ({words.get(PROBLEM, 'no answer')})"
        if words.get(HASH) != self._agreed:
            return "has not agreed to this configuration"
        if (refusal := self._keys.claim(client, online[node])) is not None:
            return refusal
        if (holder := self._nodes.get(client)) in online:
            return f"says that it is client {client}, which node {holder} is"
        self._nodes[client] = node
        return None
