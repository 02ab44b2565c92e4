"""What cells will take, before they run: steps, bytes and time."""

import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedlight.config import CellConfig
from fedlight.data.client_data import ClientData
from fedlight.experiment.evaluate import is_due, scored_clients
from fedlight.experiment.setup import Components, check, make_server, worker_room
from fedlight.federation.cohort import cohort_size
from fedlight.reporting import numbers
from fedlight.runs.identity import cell_folder
from fedlight.runs.status import DONE, read_cell

WIDTH = 160  # of the table in a file or a pipe, in characters


@dataclass(frozen=True)
class Estimate:
    """What a cell takes from its first round to its last.

    Attributes:
        steps: of all clients' optimizers.
        bytes: that cross, both ways, of random deltas where they are encoded; without what an algorithm's
            clients report beside the slices.
        seconds: on this machine, by the time of one step.
    """

    steps: int
    bytes: int
    seconds: float


def estimate(components: Components) -> Estimate:
    """Sends all messages of a cell in thought, and takes one step and one look at the clock."""
    config, method = components.config, components.method
    server = make_server(
        "", config, components.module, components.slices, components.algorithm, components.codec
    )
    shares = [sum(map(len, components.shares))] if method.pool else [len(own) for own in components.shares]
    batches = [-(-images // config.data.batch_size) for images in shares]
    chance, state = torch.Generator().manual_seed(0), components.module.state_dict()
    delta = {name: torch.randn(tensor.shape, generator=chance) for name, tensor in state.items()}
    sent = {}
    for name in method.in_round(1, components.slices.names).uplink:
        part = components.slices.select([name], delta)
        zero = {key: torch.zeros_like(tensor) for key, tensor in part.items()}
        sent[name], _ = components.codec.encode(part, zero, {}, np.random.default_rng(0), name)
    steps = 0
    for _ in range(config.rounds):
        for message in server.start_round():
            if not message.drops_out:
                steps += config.epochs * batches[message.client]
                if not method.pool:
                    up = {name: sent[name] for name in message.uplink}
                    server.ledger.add(message.round, message.client, "up", up)
        server.ledger.finish_round(0)
        server.round += 1
    return Estimate(steps, server.ledger.bytes, _seconds(components, steps, max(shares)))


def print_plan(cells: Sequence[CellConfig]) -> None:
    """Prints what is done, and what each cell takes."""
    table = Table(*("cell", "state"), title="the plan; nothing is run", title_justify="left")
    for head in ("steps", "bytes", "time, about"):
        table.add_column(head, justify="right")
    left = []
    notes: dict[str, None] = {}
    for config in cells:
        folder = cell_folder(config)
        cell = read_cell(folder, None, {})
        state = f"{cell.state}, round {cell.round}" if cell.round and cell.state != DONE else cell.state
        components = check(config, elsewhere=False)
        assert components is not None
        notes |= dict.fromkeys(components.dataset.notes)
        found = estimate(components)
        row = (numbers.count(found.steps), numbers.data_volume(found.bytes), numbers.seconds(found.seconds))
        table.add_row(folder.name, state, *row)
        if cell.state != DONE:
            left.append(found)
    for note in notes:
        print(f"fedlight: {note}", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    total = Estimate(*(sum(column) for column in zip(*map(astuple, left), strict=True))) if left else None
    done = f"{len(cells)} cells, {len(cells) - len(left)} done"
    console.print(
        f"{done}; left: {numbers.count(total.steps)} steps, {numbers.data_volume(total.bytes)} exchanged, "
        f"about {numbers.seconds(total.seconds)} on this machine, a cell after the other"
        if total
        else done,
        soft_wrap=True,
    )


def _seconds(components: Components, steps: int, largest: int) -> float:
    """The time of training and sampling, by that of one step; forward is a third of it."""
    config = components.config
    batch = min(config.data.batch_size, largest)
    same = config.model_dump_json(include={"model", "data", "optimizer", "trainer"})
    step = _step_seconds(same, components, batch) / batch
    at_once = min(worker_room(config, components.device), cohort_size(config.clients, config.fraction))
    models = len(scored_clients(config, frozenset())) if components.method.evaluate == "clients" else 1
    due = sum(is_due(round_, config) for round_ in range(1, config.rounds + 1))
    forwards = models * due * config.evaluation.samples * config.evaluation.steps
    return (steps * config.data.batch_size * step + forwards * step / 3) / at_once


_timed: dict[str, float] = {}  # seconds of a step, by what decides it


def _step_seconds(same: str, components: Components, batch: int) -> float:
    if same not in _timed:
        module = components.module.to(components.device)
        optimizer = module.configure_optimizers()
        pixels, labels = components.training_data()
        data = ClientData(pixels, np.arange(batch), batch, labels)
        (drawn,) = data.train_dataloader()
        images = data.on_after_batch_transfer(drawn, 0)
        for _ in range(2):  # the first makes what later ones find
            begun = time.perf_counter()
            optimizer.zero_grad()
            loss = module.training_step(images, 0)
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            _timed[same] = time.perf_counter() - begun
    return _timed[same]
