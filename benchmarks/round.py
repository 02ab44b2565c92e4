"""The cost of a round beside its steps: fedlight against a bare PyTorch loop of the same work.

python benchmarks/round.py [--quick] [--out FILE.json]

Both train the same model by FULL, with the same random numbers: their final weights must be equal bit for
bit, else the benchmark fails. fedlight's time includes all parts of a round: Trainers, callbacks, updates
through files, the aggregation, the ledger, the checkpoint. In updates of 5 steps a client has hardly any
work. The last column is the same with two processes, the default of a cell on two cores.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from common import composed, in_turns, parser, show, write
from lightning import seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from fedlight.experiment.clients import SiteMaker, make_site
from fedlight.experiment.parts import CHECKPOINT, CellParts
from fedlight.experiment.setup import make_cell_server, set_up
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.transport.processes import Processes, end_workers
from fedlight.federation.transport.transport import TransportContext
from fedlight.loggers.bars import ProgressBars
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.seeds import derive_seed

CLIENTS, BATCH, WORKERS = 4, 16, 2


def bare(parts: CellParts, first: Mapping[str, Tensor]) -> str:
    """FedAvg in thirty lines; returns the hash of the final weights."""
    state, module, config = dict(first), parts.model, parts.config
    data = parts.dataset.train.pixels
    pixels = [data[torch.from_numpy(share).sort().values] for share in parts.client_indices]
    for round_ in range(1, config.rounds + 1):
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for client, own in enumerate(pixels):
            seed_everything(derive_seed(config.seed, "client", round_, client), verbose=False)
            module.load_state_dict(state)
            optimizer = module.configure_optimizers()
            for _ in range(config.epochs):
                drawn = torch.randperm(len(own))
                torch.empty((), dtype=torch.int64).random_()  # a DataLoader's draw for its workers
                for batch in drawn.split(config.data.batch_size):
                    images = own[batch].float().div_(127.5).sub_(1)
                    t = torch.randint(1000, images.shape[:1])
                    eps = torch.randn_like(images)
                    x_t = module.schedule.add_noise(images, eps, t)
                    optimizer.zero_grad()
                    F.smooth_l1_loss(module.unet(x_t, t).sample, eps).backward()
                    optimizer.step()
            for name, tensor in module.state_dict().items():
                sums[name].add_(tensor.double(), alpha=len(own))
        images_ = sum(map(len, pixels))
        state = {name: (total / images_).float() for name, total in sums.items()}
    return state_sha256(state)


def federated(parts: CellParts, folder: Path, first: Mapping[str, Tensor], workers: int) -> str:
    """The same by fedlight, as a cell runs it, in one process or in several."""
    config = parts.config
    parts.model.load_state_dict(first)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / CHECKPOINT).mkdir(parents=True)
    with ProgressBars("round", config.rounds) as bars:
        callbacks = [bars, LambdaCallback(on_train_batch_end=lambda *_: None)]
        site = make_site(parts, folder, callbacks)
        server = make_cell_server(folder.name, parts)
        checkpoint = ServerCheckpoint(folder / CHECKPOINT, folder.name)
        monitor = SimpleNamespace(end_update=bars.end_update, check=lambda: None)
        context = TransportContext(site, SiteMaker(config, folder, parts.noise), workers, server, monitor)
        transport = Processes(context, workers)
        while server.round < config.rounds:
            for update in transport.exchange(server.start_round()):
                server.receive(update)
            server.finish_round()
            server.save(checkpoint, {})
        return state_sha256(server.theta)


def main() -> None:
    given = parser(__doc__).parse_args()
    quick = given.quick
    # Two rounds or more: a worker stays, and would hand out the last round's updates again in the same round.
    works = [  # model and data, steps an update, local epochs, rounds, repeats
        ("tiny UNet, digits", ["model=tiny"], 5, 1, 2, 9 if quick else 25),
        ("tiny UNet, digits", ["model=tiny"], 100, 5, 2, 2 if quick else 5),
        ("paper's UNet, Fashion-MNIST", ["model=paper", "data=fmnist"], 5, 1, 2, 1 if quick else 5),
    ]
    rows, ratios, figures = [], {}, {}
    for what, chosen, steps, epochs, rounds, repeats in works:
        _, config = composed(
            *(*chosen, f"clients={CLIENTS}", f"rounds={rounds}", f"epochs={epochs}"),
            *(f"data.batch_size={BATCH}", f"data.limit={CLIENTS * BATCH * steps // epochs}"),
            *("evaluation.samples=0", "logger=none"),
        )
        parts = set_up(config)
        first = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
        hashes: set[str] = set()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "cell")

            def note(act: Callable[..., str], *given: Any) -> None:
                hashes.add(act(parts, *given))  # noqa: B023

            seconds = in_turns(
                {
                    "bare": partial(note, bare, first),
                    "fedlight": partial(note, federated, folder, first, 1),
                    "at once": partial(note, federated, folder, first, WORKERS),
                },
                repeats,
            )
        assert len(hashes) == 1, "they did not compute the same"
        ratio, at_once = (seconds[name] / seconds["bare"] for name in ("fedlight", "at once"))
        updates = rounds * CLIENTS
        rows.append(
            [
                f"{what}, {steps} steps",
                *(f"{1e3 * seconds[name] / updates:.1f}" for name in ("bare", "fedlight")),
                f"{1e3 * (seconds['fedlight'] - seconds['bare']) / updates:.1f}",
                f"{ratio:.3f}x",
                f"{at_once:.3f}x",
            ]
        )
        ratios[f"round, {what}, {steps} steps, bare over fedlight"] = 1 / ratio
        ratios[f"round, {what}, {steps} steps, bare over fedlight in {WORKERS} processes"] = 1 / at_once
        figures[f"{what}, {steps} steps"] = seconds
    end_workers()
    show(
        f"rounds of FULL, {CLIENTS} clients, batch {BATCH}, one thread: milliseconds a local update",
        ["", "bare loop", "fedlight", "more", "ratio", f"ratio, {WORKERS} processes"],
        rows,
    )
    write(given.out, ratios, {"seconds": figures})


if __name__ == "__main__":
    main()
