"""Clients in institutions of their own, reached over a Flower SuperLink; who is away drops out."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlight.federation.admission import check_scores
from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update, from_bytes, to_bytes
from fedlight.federation.transport.node_keys import NodeKeys
from fedlight.federation.transport.transport import TransportContext
from fedlight.runtime.errors import BadInput, Damaged
from fedlight.runtime.printable import printable

LOOK = 0.5  # seconds between two looks for answers
AGAIN = 60.0  # seconds after which a node that was refused is asked again
HELLO, TRAIN, EVALUATE = "query", "train", "evaluate"  # types of Flower's messages


@dataclass(frozen=True)
class Sent:
    """A message on its way: what was asked of which client and node, and until when an answer counts."""

    asked: Broadcast | Evaluation | None
    node: int
    until: float


class Flower:
    """Messages over a SuperLink to one SuperNode a client.

    A client without a node is waited for as long as others are at work; and for `timeout` in the first
    exchange of a process, and where no client can be reached at all. Then it drops out of the round. A bad
    answer is refused with a line, as if the client had been away.

    Args:
        context: of the cell.
        timeout: seconds that a client has for an answer.
        nodes: fingerprints of the nodes' keys in client order; None where a client number belongs to the key
            of the node that says it first.

    Attributes:
        grid: Flower's way to the nodes, inside a ServerApp.
        agreed: SHA-256 of the configuration that every institution agreed to.
    """

    grid: ClassVar[Any] = None
    agreed: ClassVar[str] = ""

    def __init__(self, context: TransportContext, timeout: float, nodes: Sequence[str] | None = None) -> None:
        if self.grid is None:
            raise BadInput(
                "transport=flower runs inside a deployment: fedlight deploy init FOLDER writes one"
            )
        self._context = context
        self._timeout = timeout
        self._keys = NodeKeys(context.here.folder / "nodes.txt", nodes)
        self._nodes: dict[int, int] = {}  # client: node
        self._strangers: dict[int, float] = {}  # nodes that were refused, and when they may ask again
        self._greeted: dict[int, str] = {}  # node: message that asks who it is
        self._counts: dict[int, int] = {}  # client: n_k, as it last said
        self._first = True

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        waiting = {broadcast.client: broadcast for broadcast in broadcasts}
        for asked, reply in self._ask(TRAIN, waiting):
            if reply is None:
                self._context.unsent(asked.client)
            elif (update := self._admitted(asked, reply)) is not None:
                yield update
        self._first = False

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        waiting = {request.client: request for request in requests}
        for request, reply in self._ask(EVALUATE, waiting):
            if reply is not None and (scores := self._admitted_scores(request, reply)) is not None:
                yield scores

    def _ask(self, kind: str, waiting: dict[int, Any]) -> Iterator[tuple[Any, Any]]:
        """Each request with its answer, as they come; a line is told of a client that does not answer.

        Where a request could not be sent, None stands for the answer.
        """
        from fedlight.federation.transport.envelope import wrap

        begun, under_way, patient = time.monotonic(), dict[str, Sent](), True
        while waiting or under_way:
            self._context.check()
            online = {node.node_id: bytes(node.public_key) for node in self.grid.get_nodes()}
            self._meet(online)
            for client in [client for client in waiting if self._nodes.get(client) in online]:
                asked = waiting.pop(client)
                sent = self._send(kind, self._nodes[client], wrap(to_bytes(asked), {}), str(asked.round))
                if sent:
                    patient = self._first or kind == EVALUATE
                    until = time.monotonic() + self._timeout
                    under_way[sent] = Sent(asked, self._nodes[client], until)
                else:
                    self._tell(client, "could not be sent to; it drops out of the round")
                    yield asked, None
            for reply in self._pull(under_way):
                sent_ = under_way.pop(reply.metadata.reply_to_message_id)
                yield sent_.asked, reply
            now = time.monotonic()
            for number in [number for number, sent in under_way.items() if now > sent.until]:
                client = under_way.pop(number).asked.client  # type: ignore[union-attr]
                self._tell(client, f"did not answer within {self._timeout:g} s; it drops out of the round")
            if not under_way and now - begun > (self._timeout if patient else 0) and not self._greeted:
                for client, asked in waiting.items():
                    self._tell(client, "has no node online; it drops out of the round")
                    yield asked, None
                return
            time.sleep(LOOK)

    def _meet(self, online: dict[int, bytes]) -> None:
        """Asks new nodes who they are; one whose key is not that client's, or that did not agree, is refused.

        Args:
            online: the public keys of the nodes that are there.
        """
        from fedlight.federation.transport.envelope import CLIENT, HASH, PROBLEM, open_words, wrap

        self._greeted = {node: number for node, number in self._greeted.items() if node in online}
        now = time.monotonic()
        self._strangers = {node: until for node, until in self._strangers.items() if now < until}
        known = {*self._nodes.values(), *self._greeted, *self._strangers}
        for node in online.keys() - known:
            if number := self._send(HELLO, node, wrap(b"", {}), "hello"):
                self._greeted[node] = number
        for reply in self._pull(self._greeted.values()):
            asked = reply.metadata.reply_to_message_id  # who did not answer in time is not the source
            node = next(node for node, number in self._greeted.items() if number == asked)
            del self._greeted[node]
            words = open_words(reply.content) if reply.has_content() else {}
            client, sha256 = words.get(CLIENT), words.get(HASH)
            holder = self._nodes.get(client) if isinstance(client, int) else None
            if PROBLEM in words or not isinstance(client, int):
                refusal = f"cannot take part ({words.get(PROBLEM, 'no answer')})"
            elif sha256 != self.agreed:
                refusal = "has not agreed to this configuration"
            elif (unbound := self._keys.claim(client, online[node])) is not None:
                refusal = unbound
            elif holder is not None and holder in online:
                refusal = f"says that it is client {client}, which node {holder} is"
            else:
                self._nodes[client] = node
                continue
            self._strangers[node] = now + AGAIN
            print(f"fedlight: node {node} {refusal}: refused", file=sys.stderr)

    def _send(self, kind: str, node: int, content: Any, group: str) -> str | None:
        from flwr.app import Message

        message = Message(content, node, kind, ttl=self._timeout, group_id=group)
        (number,) = list(self.grid.push_messages([message])) or [None]
        return number

    def _pull(self, numbers: Iterable[str]) -> list[Any]:
        asked = list(numbers)
        return list(self.grid.pull_messages(asked)) if asked else []

    def _admitted(self, broadcast: Broadcast, reply: Any) -> Update | None:
        """The update, where it answers the broadcast and fits the global model; else a line says why not."""
        update = self._read(broadcast.client, reply, Update)
        if update is None:
            return None
        try:
            sent = (broadcast.cell, broadcast.round, broadcast.client)
            if (update.cell, update.round, update.client) != sent:
                raise Damaged("answers another broadcast")
            self._context.admit(update, broadcast.uplink)
        except Damaged as error:
            self._tell(broadcast.client, f"sent an update that {printable(error)}: refused")
            return None
        if update.num_examples != self._counts.get(update.client, 0):  # privacy reports 0
            self._counts[update.client] = update.num_examples
            weight = f"client {update.client} counts as {update.num_examples:,} images in the mean"
            print(f"fedlight: {weight}", flush=True)
        return update

    def _admitted_scores(self, request: Evaluation, reply: Any) -> Scores | None:
        """The scores, where they answer the request; else a line says why not."""
        scores: Scores | None = self._read(request.client, reply, Scores)
        if scores is None:
            return None
        try:
            check_scores(scores, request)
            if request.draw:
                self._context.admit_scores(scores)
        except Damaged as error:
            self._tell(request.client, f"sent an evaluation that {printable(error)}: refused")
            return None
        return scores

    def _read(self, client: int, reply: Any, kind: type) -> Any:
        """The message in an answer, or None with a line that says what is wrong."""
        from fedlight.federation.transport.envelope import MEMORY_LOST, PROBLEM, open_bytes, open_words

        if not reply.has_content():
            self._tell(client, f"did not answer ({reply.error.code}); it drops out of the round")
            return None
        if problem := open_words(reply.content).get(PROBLEM):
            if problem == MEMORY_LOST:
                self._context.forget(client)
            self._tell(client, f"has no update ({problem}); it drops out of the round")
            return None
        try:
            message = from_bytes(open_bytes(reply.content))
            if not isinstance(message, kind):
                raise Damaged(f"this is a {type(message).__name__}")
        except Damaged as error:
            self._tell(client, f"sent what cannot be read ({printable(error)}): refused")
            return None
        return message

    def _tell(self, client: int, what: str) -> None:
        node = self._nodes.get(client)
        whose = f"client {client}" if node is None else f"client {client} (node {node})"
        print(f"fedlight: {whose} {what}", file=sys.stderr)
