"""The cost of a cell, estimated before it runs: optimizer steps, bytes exchanged and time."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from fedlight.data.client_data import ClientData
from fedlight.experiment.parts import CellParts
from fedlight.experiment.scored_models import is_evaluation_round, scored_clients
from fedlight.experiment.setup import make_cell_server
from fedlight.federation.cohort import cohort_size

_step_seconds_cache: dict[str, float] = {}  # the settings that decide it -> seconds of one optimizer step


@dataclass(frozen=True)
class Estimate:
    """The cost of a cell from its first round to its last.

    Attributes:
        steps: optimizer steps of all clients.
        bytes: bytes exchanged in both directions, without the auxiliary state that clients report; where a
            transform encodes updates, those of normally distributed deltas.
        seconds: training and sampling time on this machine.
    """

    steps: int
    bytes: int
    seconds: float


def estimate(parts: CellParts, taken: int = 0) -> Estimate:
    """Simulates the traffic of a cell and times one optimizer step.

    Args:
        parts: of the cell.
        taken: number of first rounds that cost nothing, since a shorter cell has them.
    """
    config, method = parts.config, parts.method
    server = make_cell_server("", parts)
    sizes = [len(indices) for indices in parts.training_indices]
    batches = [-(-images // config.data.batch_size) for images in sizes]
    generator, state = torch.Generator().manual_seed(0), parts.model.state_dict()
    delta = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    sent = {}
    for slice_ in method.in_round(1, parts.slices.names).uplink:
        values = parts.slices.select([slice_], delta)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
        sent[slice_], _ = parts.codec.encode(values, zeros, {}, np.random.default_rng(0), slice_)
    steps, bytes_taken = 0, 0
    for round_ in range(1, config.rounds + 1):
        for message in server.start_round():
            if not message.drops_out:
                steps += config.epochs * batches[message.client] if round_ > taken else 0
                if not method.pool:
                    up = {name: sent[name] for name in message.uplink}
                    server.ledger.add(message.round, message.client, "up", up)
        server.ledger.finish_round(0)
        server.round += 1
        if round_ == taken:
            bytes_taken = server.ledger.bytes
    return Estimate(steps, server.ledger.bytes - bytes_taken, _seconds(parts, steps, max(sizes), taken))


def _seconds(parts: CellParts, steps: int, largest: int, taken: int) -> float:
    """The time of training and sampling, from that of one step, of which the forward pass is a third.

    Args:
        parts: of the cell.
        steps: optimizer steps of all clients.
        largest: images of the largest client.
        taken: number of first rounds that cost nothing.
    """
    config = parts.config
    batch = min(config.data.batch_size, largest)
    settings = config.model_dump_json(include={"model", "data", "optimizer", "trainer"})
    per_image = _step_seconds(settings, parts, batch) / batch
    parallel = min(parts.max_workers, cohort_size(config.clients, config.fraction))
    models = len(scored_clients(config, frozenset())) if parts.method.evaluate == "clients" else 1
    evaluations = sum(is_evaluation_round(round_, config) for round_ in range(taken + 1, config.rounds + 1))
    forwards = models * evaluations * config.evaluation.samples * config.evaluation.steps
    return (steps * config.data.batch_size * per_image + forwards * per_image / 3) / parallel


def _step_seconds(settings: str, parts: CellParts, batch: int) -> float:
    """The time of one optimizer step, measured once for each value of `settings`."""
    if settings not in _step_seconds_cache:
        module = parts.model.to(parts.device)
        optimizer = module.configure_optimizers()
        pixels, labels = parts.training_data()
        data = ClientData(pixels, np.arange(batch), batch, labels)
        (drawn,) = data.train_dataloader()
        images = data.on_after_batch_transfer(drawn, 0)
        for _ in range(2):  # the first step allocates what later ones reuse
            started = time.perf_counter()
            optimizer.zero_grad()
            loss = module.training_step(images, 0)
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            _step_seconds_cache[settings] = time.perf_counter() - started
    return _step_seconds_cache[settings]
