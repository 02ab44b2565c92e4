"""Toy clients over Flower's grid under secure aggregation, whose nodes fail at chosen steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grid import Grid, Node
from sums import secure_server
from toy import federate, toy_context, toy_site

from fedlight.deployment.institution import Institution
from fedlight.deployment.terms import Terms
from fedlight.federation.client import ClientSetup
from fedlight.federation.messages import MaskMessage, from_bytes, to_bytes
from fedlight.federation.secure.mask_client import MaskClient
from fedlight.federation.secure.signatures import Signer
from fedlight.federation.transport.flower import Flower
from fedlight.federation.transport.transport import Deployment
from fedlight.runtime.errors import Damaged

NODE = 11  # number of the node of client 0; the others follow


def write_key(path: Path, curve: ec.EllipticCurve | None = None) -> Path:
    """A new private key in the file format of ssh-keygen."""
    key = ec.generate_private_key(curve or ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return path


def step_of(content: bytes) -> str:
    """The step of a message in bytes, or its type."""
    message = from_bytes(content)
    return message.step if isinstance(message, MaskMessage) else type(message).__name__


class MaskedToys:
    """A server and institutions.

    Attributes:
        signers: sign the public keys of the clients; empty for none.
        received: what the server received from each client, in order.
        refusals: why clients refused a message.
    """

    def __init__(
        self,
        setup: ClientSetup,
        folder: Path,
        patch: pytest.MonkeyPatch,
        clients: int = 5,
        signers: Sequence[Signer] = (),
    ) -> None:
        from flwr.supercore.task_identity import TaskIdentity

        assert setup.secure
        self.signers = signers
        self.setup, self.server = setup, secure_server(setup, clients)
        terms = Terms(
            setup.method, tuple(setup.slices.names), 10, self.server.participation, lambda round_: False
        )
        self.institutions = [
            Institution(
                "toy",
                k,
                toy_site(setup, folder / str(k)),
                folder / str(k),
                terms,
                MaskClient(setup.secure, k, signers[k] if signers else None),
            )
            for k in range(clients)
        ]
        self.received: dict[int, list[bytes]] = {k: [] for k in range(clients)}
        self.refusals: list[str] = []
        self.grid = Grid({NODE + k: Node(k, self._tapped(k)) for k in range(clients)})
        patch.setattr("fedlight.federation.transport.flower.POLL", 0.0)
        for name in ("_run_id", "_task_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        self.notes = folder / "server"
        self.start_server()

    def start_server(self) -> None:
        """The transport of a server that has just started."""
        site = toy_site(self.setup, self.notes)
        context = toy_context(site, server=self.server, deployment=Deployment(self.grid, "agreed"))
        self.transport = Flower(context, timeout=0.5)

    def run(self, rounds: int) -> None:
        for _ in federate(self.server, self.transport, rounds):
            pass

    def kill(self, client: int, step: str) -> None:
        """The node of a client ends for good when it receives the message of a step."""
        node, act = self.grid.nodes[NODE + client], self._tapped(client)

        def killed(content: bytes) -> bytes:
            if step_of(content) != step:
                return act(content)
            node.online = False
            return b"broken off"

        node.act = killed

    def change(self, client: int, step: str, change: Any) -> None:
        """The node of a client changes its answer to the message of a step."""
        act = self._tapped(client)

        def changed(content: bytes) -> bytes:
            answer = act(content)
            return to_bytes(change(from_bytes(answer))) if step_of(content) == step else answer

        self.grid.nodes[NODE + client].act = changed

    def _tapped(self, client: int) -> Any:
        institution = self.institutions[client]

        def answer(content: bytes) -> bytes:
            try:
                answered = institution.answer(content)
            except Damaged as error:
                self.refusals.append(str(error))
                return b"failed"
            self.received[client].append(answered)
            return answered

        return answer
