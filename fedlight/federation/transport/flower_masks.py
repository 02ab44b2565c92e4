"""A round of secure aggregation over Flower: four exchanges with the nodes, and the sum of their masks."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from fedlight.federation.messages import Broadcast, MaskMessage, Message, Update
from fedlight.federation.secure.mask_server import MaskServer
from fedlight.federation.server import Server
from fedlight.runtime.errors import Damaged
from fedlight.runtime.printable import printable

Request: TypeAlias = Callable[[dict[int, Any]], Iterator[tuple[Any, Any]]]
"""Sends messages by client; yields each with its reply, None where it could not be sent."""
Read: TypeAlias = Callable[[int, Any, type], Any]
"""Reads the message of a client's reply; None where it is refused, which is reported."""
Report: TypeAlias = Callable[[int, str], None]
"""Reports a client in one line."""


class MaskedExchange:
    """Exchanges the broadcasts of one round for masked updates, and gives the server the masks of their sum.

    A client that fails at a step drops out of the round. The others go on while they can unmask; below that
    the round is lost.

    Args:
        server: of the cell, with a round open.
        request, read, report: of the transport.
    """

    def __init__(self, server: Server, request: Request, read: Read, report: Report) -> None:
        assert server.secure
        self._server = server
        self._request = request
        self._read = read
        self._report = report
        params = {
            slice_: server.secure.count_params(slice_, server.theta)
            for uplink in server.planned.values()
            for slice_ in uplink
        }
        self._masks = MaskServer(
            server.cell, server.round + 1, server.secure, server.planned, params, server.hash_sent()
        )

    def run(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        """Yields the masked updates as they arrive; after the last one the server has their masks."""
        masks, server = self._masks, self._server
        for broadcast, reply in self._request({message.client: message for message in broadcasts}):
            if reply is None:
                server.withdraw(broadcast.client)
            else:
                self._take(broadcast, reply, MaskMessage, masks.add_keys)
        if self._are_too_few(masks.keyed, "sent keys"):
            return
        for message, reply in self._send(masks.key_lists()):
            self._take(message, reply, MaskMessage, masks.add_shares)
        if self._are_too_few(masks.sharing, "sent shares"):
            return
        survivors: set[int] = set()
        for message, reply in self._send(masks.share_lists()):
            update = self._take(message, reply, Update, self._admit)
            if update is not None:
                survivors.add(update.client)
                yield update
        if self._are_too_few(survivors, "sent masked updates"):
            return
        for message, reply in self._send(masks.survivor_lists(survivors)):
            self._take(message, reply, MaskMessage, masks.add_revealed)
        try:
            server.unmask(masks.masks())
        except Damaged as error:
            server.lose_round(str(error))
        for client in sorted(masks.liars):
            self._report(client, "revealed a share that does not fit those of the others")

    def _send(self, messages: list[MaskMessage]) -> Iterator[tuple[MaskMessage, Any]]:
        """Sends messages of masks; yields those that could be sent, with their replies."""
        for message, reply in self._request({message.client: message for message in messages}):
            if reply is not None:
                self._server.count_masks(message.client, "down", _count_bytes(message))
                yield message, reply

    def _take(self, sent: Message, reply: Any, kind: type, take: Callable[[Any], None]) -> Any:
        """The answer to a message after it was checked and taken; None where it is refused."""
        answer = self._read(sent.client, reply, kind)
        if answer is None:
            return None
        try:
            expected = self._server.cell, self._server.round + 1, sent.client
            if (answer.cell, answer.round, answer.client) != expected:
                raise Damaged("answers another message")
            take(answer)
        except Damaged as error:
            self._report(sent.client, f"sent a message that {printable(error)}: refused")
            return None
        if isinstance(answer, MaskMessage):
            self._server.count_masks(answer.client, "up", _count_bytes(answer))
        return answer

    def _admit(self, update: Update) -> None:
        self._server.admit(update, self._server.planned[update.client])

    def _are_too_few(self, clients: set[int], what: str) -> bool:
        """Whether the round is lost, since fewer clients are left than can unmask."""
        planned, needed = len(self._server.planned), self._masks.threshold
        if len(clients) >= needed:
            return False
        self._server.lose_round(f"{len(clients)} of {planned} clients {what}, and {needed} are needed")
        return True


def _count_bytes(message: MaskMessage) -> int:
    return sum(payload.bytes for payload in message.payloads.values())
