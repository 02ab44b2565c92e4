"""Bytes and seconds of secure aggregation against plain updates, for the paper's UNet.

python benchmarks/secure.py [--quick] [--clients 5,20,100] [--out FILE.json]

All slices are reported (method FULL), and no client fails. The messages are those that institutions send, in
one process. Seconds are of one client (its encoding, its keys and shares, its masks) and of the server (the
sum of all updates, the reconstruction of all seeds and the removal of all masks), with one thread. All
clients make their shares; the vector of the first one stands for those of all.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import composed, parser, show, write

from fedlight.data.class_names import DIGITS
from fedlight.experiment.mechanisms import make_aggregation
from fedlight.experiment.setup import make_client_model
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import MaskMessage, Payload, Update, from_bytes, to_bytes
from fedlight.federation.secure.integers import unpack_integers
from fedlight.federation.secure.mask_bytes import mask_traffic
from fedlight.federation.secure.mask_client import MaskClient
from fedlight.federation.secure.mask_server import MaskServer
from fedlight.federation.secure.masks import hash_model
from fedlight.federation.secure.secure_sum import INTEGERS, STATISTICS

PAPER = ("experiment=paper", "logger=none", "aggregation=secure")


class Round:
    """One round of a cohort, whose steps are timed."""

    def __init__(self, clients: int) -> None:
        _, config = composed(*PAPER, f"clients={clients}", "trainer.accelerator=cpu")
        model, slices, _ = make_client_model(config, DIGITS)
        self.theta = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        method = config.method.resolve(slices.names)
        secure = make_aggregation(config, method, slices, FedAvg(), 0.0, self.theta)
        assert secure
        self.secure, self.uplink, self.clients = secure, tuple(method.uplink), clients
        self.planned = dict.fromkeys(range(clients), self.uplink)
        self.seconds: dict[str, float] = {}

    def timed(self, what: str, act: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = act()
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begun
        return result

    def run(self) -> dict[str, float]:
        """Seconds by step, and bytes of a client."""
        secure, clients = self.secure, range(self.clients)
        trained = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in self.theta.items()}
        payloads = self.timed(
            "encode", lambda: secure.encode(self.uplink, trained, self.theta, {}, 600, 0.1, 1, 0)
        )
        params = {slice_: payload.params for slice_, payload in payloads.items()}
        model = hash_model(self.theta, {})
        server = MaskServer("bench", 1, secure, self.planned, params, model)
        members = [MaskClient(secure, client) for client in clients]
        update = Update("bench", 1, 0, 0, None, payloads)
        for client in clients:
            server.add_keys(members[client].begin(replace(update, client=client), self.planned, model))
        for message in server.key_lists():
            own = message.client == 0
            answer = (
                self.timed("shares", lambda m=message: members[0].answer(m))
                if own
                else members[message.client].answer(message)
            )
            server.add_shares(answer)
        lists = server.share_lists()
        masked: Update = self.timed("mask", lambda: members[0].answer(lists[0]))
        for client, message in zip(clients[1:], lists[1:], strict=True):  # shares are read, nothing is masked
            session = members[client]._current
            assert session
            session.update, session.seeds = replace(session.update, payloads={}), {}
            members[client].answer(message)
        survivors = server.survivor_lists(clients)
        revealed = [members[message.client].answer(message) for message in survivors]
        self.timed("sum", lambda: self._sum(masked))
        for message in revealed:
            server.add_revealed(message)
        self.timed("unmask", server.masks)
        self._check(update, masked)
        plain = sum(tensor.nbytes for tensor in self.theta.values())
        down, up = mask_traffic(self.planned, clients, self.uplink)[0]
        vectors = sum(payload.bytes for payload in masked.payloads.values())
        counted = _size(server.key_lists()[0]) + _size(lists[0]) + _size(survivors[0])
        assert counted == down
        return {
            **self.seconds,
            "plain MB": plain / 1e6,
            "masked MB": vectors / 1e6,
            "keys and shares up, kB": up / 1e3,
            "keys and shares down, kB": down / 1e3,
        }

    def _sum(self, masked: Update) -> None:
        """Adds as many masked updates as there are clients, each read from its bytes."""
        content = to_bytes(masked)
        bits = self.secure.fixed.modulus_bits
        totals = {s: np.zeros(STATISTICS + p.params, np.uint64) for s, p in masked.payloads.items()}
        for _ in range(self.clients):
            for slice_, payload in from_bytes(content).payloads.items():
                totals[slice_] += unpack_integers(payload.tensors[INTEGERS], bits, len(totals[slice_]))

    def _check(self, plain: Update, masked: Update) -> None:
        """The masked update is another one."""
        for slice_, payload in plain.payloads.items():
            assert not payload.tensors[INTEGERS].equal(masked.payloads[slice_].tensors[INTEGERS])


def _size(message: MaskMessage) -> int:
    payloads: dict[str, Payload] = message.payloads
    return sum(payload.bytes for payload in payloads.values())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--clients", default="5,20,100", help="cohorts (default: %(default)s)")
    given = arguments.parse_args()
    cohorts = [5] if given.quick else [int(number) for number in given.clients.split(",")]
    Round(cohorts[0]).run()  # the first calls load libraries
    measured = {clients: Round(clients).run() for clients in cohorts}
    columns = [*next(iter(measured.values()))]
    rows = [
        [str(clients), *(f"{figures[column]:.2f}" for column in columns)]
        for clients, figures in measured.items()
    ]
    show("the paper's UNet under secure aggregation", ["clients", *columns], rows)
    write(given.out, {}, {"cohorts": {str(clients): figures for clients, figures in measured.items()}})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
