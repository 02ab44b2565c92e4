"""Flower's grid without a network, and a toy federation over it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import RecordDict
from flwr.supercore.task_identity import TaskIdentity
from toy import federate, toy_context, toy_server, toy_site

from fedlight.deployment.institution import Institution
from fedlight.deployment.terms import Terms
from fedlight.federation.client import ClientSetup
from fedlight.federation.transport.envelope import CLIENT, HASH, PROBLEM, open_bytes, wrap
from fedlight.federation.transport.flower import Flower
from fedlight.federation.transport.transport import Deployment

Answer = Callable[[bytes], bytes]


def nobody(content: bytes) -> bytes:
    raise AssertionError("a node that is away receives no request")


def new_key() -> bytes:
    """The public half of a new node key."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@dataclass
class Node:
    """A SuperNode as a server sees it; `act` is what its institution does with a message."""

    client: int
    act: Answer = nobody
    online: bool = True
    silent: bool = False
    expired: bool = False
    agreed: str = "agreed"
    problem: str = ""
    key: bytes = field(default_factory=new_key)

    def answer(self, content: bytes) -> RecordDict:
        words = {CLIENT: self.client, HASH: self.agreed}
        if self.problem and content:
            return wrap(b"", {**words, PROBLEM: self.problem})
        return wrap(self.act(content) if content else b"", words)


@dataclass
class Grid:
    """Flower's grid without a network."""

    nodes: dict[int, Node]
    replies: dict[str, Any] = field(default_factory=dict)
    count: int = 0

    def get_nodes(self) -> list[Any]:
        online = {number: node for number, node in self.nodes.items() if node.online}
        return [SimpleNamespace(node_id=number, public_key=node.key) for number, node in online.items()]

    def push_messages(self, messages: Any) -> list[str]:
        ids = []
        for message in messages:
            self.count += 1
            node, id_ = self.nodes[message.metadata.dst_node_id], str(self.count)
            if node.expired:  # Flower's own answer, when the time that a message had is over
                about = SimpleNamespace(reply_to_message_id=id_, src_node_id=1)
                error = SimpleNamespace(code=3)
                self.replies[id_] = SimpleNamespace(metadata=about, error=error, has_content=lambda: False)
            elif not node.silent:
                about = SimpleNamespace(reply_to_message_id=id_, src_node_id=message.metadata.dst_node_id)
                content = node.answer(open_bytes(message.content))
                self.replies[id_] = SimpleNamespace(metadata=about, content=content, has_content=lambda: True)
            ids.append(id_)
        return ids

    def pull_messages(self, ids: Any) -> list[Any]:
        return [self.replies.pop(id_) for id_ in ids if id_ in self.replies]


class Toys:
    """A federation of two toy clients over the grid."""

    def __init__(
        self,
        setup: ClientSetup,
        folder: Path,
        patch: pytest.MonkeyPatch,
        rounds: int = 10,
        shows: bool = False,
    ) -> None:
        self.setup, self.server = setup, toy_server(setup)
        slices = tuple(setup.slices.names)
        self.terms = Terms(setup.method, slices, rounds, self.server.participation, lambda round_: shows)
        self.institutions = [
            Institution("toy", client, toy_site(setup, place), place, self.terms)
            for client, place in enumerate((folder / "0", folder / "1"))
        ]
        self.grid = Grid({11 + i.client: Node(i.client, i.answer) for i in self.institutions})
        patch.setattr("fedlight.federation.transport.flower.POLL", 0.0)
        for name in ("_run_id", "_task_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        self.notes = folder / "server"
        self.transport = self.start_server()

    def start_server(self, nodes: list[str] | None = None) -> Flower:
        """The transport of a server that has just started."""
        deployment = Deployment(self.grid, "agreed")
        site = toy_site(self.setup, self.notes)
        return Flower(toy_context(site, server=self.server, deployment=deployment), timeout=0.5, nodes=nodes)

    def run(self, rounds: int) -> None:
        for _ in federate(self.server, self.transport, rounds):
            pass
