"""Clients in institutions of their own, reached over a Flower SuperLink; a client that is away drops out."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedlight.federation.admission import check_scores
from fedlight.federation.messages import (
    Broadcast,
    Evaluation,
    MaskMessage,
    Scores,
    Update,
    from_bytes,
    to_bytes,
)
from fedlight.federation.transport.flower_grid import FlowerGrid
from fedlight.federation.transport.node_directory import NodeDirectory
from fedlight.federation.transport.node_keys import NodeKeys
from fedlight.federation.transport.transport import TransportContext
from fedlight.runtime.errors import BadInput, Damaged
from fedlight.runtime.printable import printable

POLL = 0.5  # seconds between two requests for replies
TRAIN, EVALUATE = "train", "evaluate"  # types of Flower's messages


@dataclass(frozen=True)
class Sent:
    """A message that was sent: its content and node, and the time until which a reply counts."""

    message: Broadcast | Evaluation | MaskMessage
    node: int
    until: float


class Flower:
    """Sends messages over a SuperLink to one SuperNode a client.

    A client without a node is waited for while others are at work. In the first exchange of a process, and
    where no client can be reached, it is waited for until `timeout`. Then it drops out of the round. An
    invalid reply is refused and reported in one line, and its client drops out as well.

    Args:
        context: of the cell.
        timeout: seconds that a client has for a reply.
        nodes: fingerprints of the nodes' keys in client order; None where a client number is bound to the key
            of the first node that claims it.

    Raises:
        BadInput: the process is not the server of a deployment.
    """

    def __init__(self, context: TransportContext, timeout: float, nodes: Sequence[str] | None = None) -> None:
        if context.deployment is None:
            raise BadInput(
                "transport=flower runs inside a deployment: fedlight deploy init FOLDER writes one"
            )
        self._context = context
        self._timeout = timeout
        self._grid = FlowerGrid(context.deployment.grid, timeout)
        keys = NodeKeys(context.site.folder / "nodes.txt", nodes)
        self._directory = NodeDirectory(self._grid, keys, context.deployment.agreed)
        self._counts: dict[int, int] = {}  # client: n_k, as last reported
        self._first = True

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        if self._context.server.secure:
            yield from self._exchange_masked(broadcasts)
            return
        waiting = {broadcast.client: broadcast for broadcast in broadcasts}
        for broadcast, reply in self._request(TRAIN, waiting):
            if reply is None:
                self._context.server.withdraw(broadcast.client)
            elif (update := self._read_update(broadcast, reply)) is not None:
                yield update
        self._first = False

    def _exchange_masked(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        from fedlight.federation.transport.flower_masks import MaskedExchange

        def request(waiting: dict[int, Any]) -> Iterator[tuple[Any, Any]]:
            yield from self._request(TRAIN, waiting)
            self._first = False

        yield from MaskedExchange(self._context.server, request, self._read, self._report).run(broadcasts)

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        waiting = {request.client: request for request in requests}
        for request, reply in self._request(EVALUATE, waiting):
            if reply is not None and (scores := self._read_scores(request, reply)) is not None:
                yield scores

    def _request(self, kind: str, waiting: dict[int, Any]) -> Iterator[tuple[Any, Any]]:
        """Sends the messages; yields each with its reply, as replies arrive.

        None stands for the reply where the message could not be sent. A client that does not reply is
        reported in one line.
        """
        from fedlight.federation.transport.envelope import wrap

        begun, under_way, patient = time.monotonic(), dict[str, Sent](), True
        while waiting or under_way:
            self._context.monitor.check()
            online = self._grid.find_nodes()
            self._directory.update(online)
            for client in list(waiting):
                node = self._directory.node_of(client)
                if node is None or node not in online:
                    continue
                message = waiting.pop(client)
                number = self._grid.send(kind, node, wrap(to_bytes(message), {}), str(message.round))
                if number:
                    patient = self._first or kind == EVALUATE
                    under_way[number] = Sent(message, node, time.monotonic() + self._timeout)
                else:
                    self._report(client, "could not be sent to; it drops out of the round")
                    yield message, None
            for reply in self._grid.pull(under_way):
                yield under_way.pop(reply.metadata.reply_to_message_id).message, reply
            now = time.monotonic()
            for number in [number for number, sent in under_way.items() if now > sent.until]:
                client = under_way.pop(number).message.client
                self._report(client, f"did not answer within {self._timeout:g} s; it drops out of the round")
            waited = now - begun > (self._timeout if patient else 0)
            if not under_way and waited and not self._directory.is_asking:
                for client, message in waiting.items():
                    self._report(client, "has no node online; it drops out of the round")
                    yield message, None
                return
            time.sleep(POLL)

    def _read_update(self, broadcast: Broadcast, reply: Any) -> Update | None:
        """The update of a reply; None where it is refused, which is reported in one line."""
        update = self._read(broadcast.client, reply, Update)
        if update is None:
            return None
        try:
            expected = (broadcast.cell, broadcast.round, broadcast.client)
            if (update.cell, update.round, update.client) != expected:
                raise Damaged("answers another broadcast")
            self._context.server.admit(update, broadcast.uplink)
        except Damaged as error:
            self._report(broadcast.client, f"sent an update that {printable(error)}: refused")
            return None
        if update.num_examples != self._counts.get(update.client, 0):  # 0 under client-level privacy
            self._counts[update.client] = update.num_examples
            weight = f"client {update.client} counts as {update.num_examples:,} images in the mean"
            print(f"fedlight: {weight}", flush=True)
        return update

    def _read_scores(self, request: Evaluation, reply: Any) -> Scores | None:
        """The scores of a reply; None where they are refused, which is reported in one line."""
        scores: Scores | None = self._read(request.client, reply, Scores)
        if scores is None:
            return None
        try:
            check_scores(scores, request)
            if request.draw:
                self._context.check_scores(scores)
        except Damaged as error:
            self._report(request.client, f"sent an evaluation that {printable(error)}: refused")
            return None
        return scores

    def _read(self, client: int, reply: Any, kind: type) -> Any:
        """The message of a reply; None where there is none of this kind, which is reported in one line."""
        from fedlight.federation.transport.envelope import MEMORY_LOST, PROBLEM, open_bytes, open_words

        if not reply.has_content():
            self._report(client, f"did not answer ({reply.error.code}); it drops out of the round")
            return None
        if problem := open_words(reply.content).get(PROBLEM):
            if problem == MEMORY_LOST:
                self._context.server.forget(client)
            self._report(client, f"has no update ({problem}); it drops out of the round")
            return None
        try:
            message = from_bytes(open_bytes(reply.content))
            if not isinstance(message, kind):
                raise Damaged(f"this is a {type(message).__name__}")
        except Damaged as error:
            self._report(client, f"sent a message that cannot be read ({printable(error)}): refused")
            return None
        return message

    def _report(self, client: int, what: str) -> None:
        node = self._directory.node_of(client)
        name = f"client {client}" if node is None else f"client {client} (node {node})"
        print(f"fedlight: {name} {what}", file=sys.stderr)
