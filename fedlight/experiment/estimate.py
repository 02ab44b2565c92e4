"""The cost of a cell, estimated before it runs: optimizer steps, bytes exchanged and time."""

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedlight.diffusion.depthwise import use_stacked_layers
from fedlight.experiment.checks import check_fuse
from fedlight.experiment.fusing import AUTO, LIMIT
from fedlight.experiment.parts import CellParts
from fedlight.experiment.scored_models import is_evaluation_round, scored_clients
from fedlight.experiment.setup import make_cell_server
from fedlight.federation.cohort import cohort_size
from fedlight.federation.messages import Payload
from fedlight.federation.stack import RandomState, Stack
from fedlight.runtime.errors import BadInput

WORTH = 1.2  # times as fast, from which on fusing is suggested
MEMORY_SHARE = 0.25  # of the machine's memory that stacked weights, gradients and two moments may take

STEP_SECTIONS = {"model", "data", "optimizer", "trainer", "finetuning"}
"""The sections of the configuration that decide the cost of a step."""

_step_seconds_cache: dict[str, float] = {}  # the settings that decide it -> seconds of one optimizer step


@dataclass(frozen=True)
class Estimate:
    """The cost of a cell from its first round to its last.

    Attributes:
        steps: optimizer steps of all clients.
        bytes: bytes exchanged in both directions, without the auxiliary state that clients report; where a
            transform encodes updates, those of normally distributed deltas. Under secure aggregation
            auxiliary state, keys and shares are among them.
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
    sent: dict[tuple[int | None, str], Payload] = {}

    def payload(client: int, slice_: str) -> Payload:
        key = parts.ranks.of(client), slice_
        if key not in sent and parts.aggregation:
            sent[key] = parts.aggregation.payload_like(slice_, state)
        elif key not in sent:
            values = parts.ranks.cut(client, parts.slices.select([slice_], delta))
            zeros = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
            sent[key], _ = parts.codec.encode(values, zeros, {}, np.random.default_rng(0), slice_)
        return sent[key]

    steps, bytes_taken = 0, 0
    for round_ in range(1, config.rounds + 1):
        for message in server.start_round():
            if not message.drops_out:
                steps += config.epochs * batches[message.client] if round_ > taken else 0
                if not method.pool:
                    up = {slice_: payload(message.client, slice_) for slice_ in message.uplink}
                    server.ledger.add(message.round, message.client, "up", up)
        if parts.aggregation:
            server.count_expected_masks()
        server.ledger.finish_round(0)
        server.round += 1
        if round_ == taken:
            bytes_taken = server.ledger.bytes
    return Estimate(steps, server.ledger.bytes - bytes_taken, _seconds(parts, steps, taken))


def describe_fuse(parts: CellParts) -> str | None:
    """What `trainer.fuse=auto` picks, or which number would make steps faster here; None where none would."""
    if parts.config.trainer.fuse == AUTO:
        if parts.fuse == 1:
            return "trainer.fuse=auto trains each client alone"
        gain = _fused_gain(parts, parts.fuse)
        number = f"trainer.fuse=auto trains up to {parts.fuse} clients at once"
        return f"{number}, {gain:.1f} times as fast a step here"
    if suggestion := suggest_fuse(parts):
        fuse, gain = suggestion
        return f"trainer.fuse={fuse} would train {fuse} clients at once, {gain:.1f} times as fast a step"
    return None


def suggest_fuse(parts: CellParts) -> tuple[int, float] | None:
    """How many clients one computation should train here (`trainer.fuse`), from memory and a measured step.

    Returns:
        The number, which leaves a group to each process, and how many times as fast their steps are; None
        where the cell sets `trainer.fuse` or cannot, or where fusing is not worth it.
    """
    config = parts.config
    per_worker = -(-cohort_size(config.clients, config.fraction) // parts.max_workers)
    model_bytes = sum(tensor.nbytes for tensor in parts.model.state_dict().values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = int(MEMORY_SHARE * memory / parts.max_workers / (4 * model_bytes))
    fuse = min(LIMIT, per_worker, fitting)
    if config.trainer.fuse or parts.method.pool or fuse < 2:
        return None
    use_stacked_layers(parts.model)
    try:
        check_fuse(config, parts.model, parts.algorithm, parts.device, parts.denoised_shape)
    except BadInput:
        return None
    gain = _fused_gain(parts, fuse)
    return (fuse, gain) if gain > WORTH else None


def _fused_gain(parts: CellParts, fuse: int) -> float:
    """How many times as fast the steps of so many clients are in one computation, measured here."""
    return fuse * _alone_seconds(parts) / _fused_seconds(parts, fuse)


def _seconds(parts: CellParts, steps: int, taken: int) -> float:
    """The time of training and sampling, from that of one step, of which the forward pass is a third.

    Args:
        parts: of the cell.
        steps: optimizer steps of all clients.
        taken: number of first rounds that cost nothing.
    """
    config = parts.config
    batch, cohort = parts.largest_batch, cohort_size(config.clients, config.fraction)
    per_image = _alone_seconds(parts) / batch
    trained, groups = per_image, cohort
    if parts.fuse > 1 and not parts.method.pool:
        trained = _fused_seconds(parts, parts.fuse) / (parts.fuse * batch)
        groups = -(-cohort // parts.fuse)
    models = len(scored_clients(config, frozenset())) if parts.method.evaluate == "clients" else 1
    evaluations = sum(is_evaluation_round(round_, config) for round_ in range(taken + 1, config.rounds + 1))
    forwards = models * evaluations * config.evaluation.samples * config.evaluation.steps
    training = steps * config.data.batch_size * trained / min(parts.max_workers, groups)
    return training + forwards * per_image / 3 / min(parts.max_workers, cohort)


def _alone_seconds(parts: CellParts) -> float:
    """The time of one optimizer step of one client."""
    use_stacked_layers(parts.model, False)
    return _step_seconds(_step_settings(parts), parts, parts.largest_batch)


def _fused_seconds(parts: CellParts, fuse: int) -> float:
    """The time of one optimizer step of several clients in one computation."""
    use_stacked_layers(parts.model)
    return _step_seconds(f"{_step_settings(parts)} {fuse}", parts, parts.largest_batch, fuse)


def _step_settings(parts: CellParts) -> str:
    return parts.config.model_dump_json(include=STEP_SECTIONS)


def _step_seconds(settings: str, parts: CellParts, batch: int, fuse: int = 1) -> float:
    """The time of one optimizer step of `fuse` clients, measured once for each value of `settings`."""
    if settings not in _step_seconds_cache:
        module: Any = parts.model.to(parts.device)
        images = parts.first_batch(batch)
        if fuse > 1:
            module, images = Stack(module, fuse), [images] * fuse
            module.begin([RandomState(0, parts.device) for _ in range(fuse)])
        optimizer = module.configure_optimizers()
        for _ in range(2):  # the first step allocates what later ones reuse
            started = time.perf_counter()
            optimizer.zero_grad()
            output = module.training_step(images, 0)
            loss = output["loss"] if fuse > 1 else output
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            _step_seconds_cache[settings] = time.perf_counter() - started
    return _step_seconds_cache[settings]
