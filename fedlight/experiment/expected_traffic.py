"""What the clients of a cell will compute and exchange: its rounds without the training."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fedlight.experiment.parts import CellParts
from fedlight.experiment.setup import make_cell_server
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import AUX, Broadcast, Payload, State
from fedlight.federation.server import Server
from fedlight.federation.trainer import count_batches, count_steps


@dataclass(frozen=True)
class Traffic:
    """Sums over the rounds of a cell and its clients.

    Attributes:
        steps: optimizer steps.
        batches: forward and backward passes; more than steps where gradients are accumulated.
        bytes: exchanged in both directions, as the ledger counts them. Where a transform encodes updates,
            those of normally distributed deltas; keys and shares of secure aggregation are among them.
    """

    steps: int
    batches: int
    bytes: int


def expected_traffic(parts: CellParts, taken: int = 0) -> Traffic:
    """Simulates the rounds of a cell, with updates of which only the size is right.

    Args:
        parts: of the cell.
        taken: number of first rounds that cost nothing, since a shorter cell has them.
    """
    config, server = parts.config, make_cell_server("", parts)
    sizes = [-(-len(indices) // config.data.batch_size) for indices in parts.training_indices]
    updates = ExpectedUpdates(parts)
    steps, batches, bytes_taken = 0, 0, 0
    for round_ in range(1, config.rounds + 1):
        for message in server.start_round():
            if message.drops_out:
                continue
            if round_ > taken:
                steps += count_steps(config.trainer, config.epochs, sizes[message.client])
                batches += count_batches(config.trainer, config.epochs, sizes[message.client])
            if not parts.method.pool:
                server.ledger.add(message.round, message.client, "up", updates.payloads(message))
                updates.note(server, message)
        if parts.aggregation:
            server.count_expected_masks()
        server.ledger.finish_round(0)
        server.round += 1
        if round_ == taken:
            bytes_taken = server.ledger.bytes
    return Traffic(steps, batches, server.ledger.bytes - bytes_taken)


class ExpectedUpdates:
    """The payloads of updates, each encoded once; where a transform encodes them, of normal deltas.

    Args:
        parts: of the cell.
    """

    def __init__(self, parts: CellParts) -> None:
        self._parts = parts
        self._state = parts.model.state_dict()
        generator = torch.Generator().manual_seed(0)
        self._delta = {name: torch.randn(t.shape, generator=generator) for name, t in self._state.items()}
        self._encoded: dict[tuple[int | None, str], Payload] = {}
        self._aux_payloads: dict[tuple[int | None, tuple[str, ...]], Payload] = {}
        self._stepped: set[str] = set()

    def payloads(self, broadcast: Broadcast) -> dict[str, Payload]:
        """Those that answer a broadcast."""
        payloads = {slice_: self.payload(broadcast.client, slice_) for slice_ in broadcast.uplink}
        if not self._parts.aggregation and (slices := self._reporting(broadcast)):
            key = self._parts.ranks.of(broadcast.client), slices
            if key not in self._aux_payloads:
                aux = self._parts.slices.auxiliary(slices, self._aux)
                self._aux_payloads[key] = Payload.plain(self._parts.ranks.cut(broadcast.client, aux))
            payloads[AUX] = self._aux_payloads[key]
        return payloads

    def note(self, server: Server, broadcast: Broadcast) -> None:
        """Steps the algorithm with auxiliary state of new names, which the next broadcasts may contain."""
        slices, reporting = self._parts.slices, self._reporting(broadcast)
        if not self._stepped.issuperset(reporting):
            theta = slices.parameters(slices.select(broadcast.uplink, self._state))
            aux = slices.auxiliary(reporting, self._aux)
            _, server.state = self._parts.algorithm.step(theta, theta, aux, server.state)
            self._stepped.update(reporting)

    def payload(self, client: int, slice_: str) -> Payload:
        """That of one slice of a client."""
        parts, key = self._parts, (self._parts.ranks.of(client), slice_)
        if key not in self._encoded and parts.aggregation:
            self._encoded[key] = parts.aggregation.payload_like(slice_, self._state)
        elif key not in self._encoded:
            values = parts.ranks.cut(client, parts.slices.select([slice_], self._delta))
            zeros = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
            self._encoded[key], _ = parts.codec.encode(values, zeros, {}, np.random.default_rng(0), slice_)
        return self._encoded[key]

    @cached_property
    def _aux(self) -> State:
        return _reported_aux(self._parts)

    def _reporting(self, broadcast: Broadcast) -> tuple[str, ...]:
        """The slices whose auxiliary state a client reports."""
        if not self._aux:
            return ()
        downlink = self._parts.method.in_round(broadcast.round, self._parts.slices.names).downlink
        return tuple(slice_ for slice_ in downlink if slice_ in broadcast.uplink)


def _reported_aux(parts: CellParts) -> State:
    """The auxiliary state of all slices that a client reports after a step of its optimizer."""
    algorithm, slices = parts.algorithm, parts.slices
    if type(algorithm).report is FedAvg.report:
        return {}
    received = slices.parameters(slices.select(slices.names, parts.model.state_dict()))
    callbacks = algorithm.callbacks(received, {}, {})
    batch: Any = [parts.first_batch(parts.largest_batch)]
    trainer = parts.make_trainer(callbacks=callbacks, max_epochs=1, max_steps=1, limit_train_batches=1)
    trainer.fit(deepcopy(parts.model), DataLoader(batch, batch_size=None))
    memory: State = {}
    for callback in callbacks:
        memory |= callback.state_dict()
    aux, _ = algorithm.report(received, received, {}, memory, 1)
    return aux
