"""What a round costs around its steps: fedlight against a bare PyTorch loop of the same work.

python benchmarks/round.py [--quick] [--out FILE.json]

Both train the same model by FULL, with the same draws: their final weights must be equal bit for
bit, else the benchmark fails. fedlight's time holds all that a round brings: Trainers, callbacks, reports
through files, the merge, the ledger, the checkpoint. In updates of 5 steps a client has hardly any work.
The last column is the same by two processes, as a cell does it by default where there are two cores.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import composed, in_turns, parser, show, write
from lightning import seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import OmegaConf
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.experiment.build import Parts, build
from fedlight.federation.cohort import Federation, Task
from fedlight.federation.federator import Federator
from fedlight.federation.rounds import federate
from fedlight.federation.store import Saved, Store
from fedlight.loggers.progress import ProgressBars
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.seeds import derive_seed
from fedlight.workers import Order, crew_of, dismiss

CLIENTS, BATCH, WORKERS = 4, 16, 2


class Cell(NamedTuple):
    """What both sides train."""

    folder: Path
    config: dict[str, Any]
    settings: CellConfig
    parts: Parts


def bare(parts: Parts, rounds: int, epochs: int, seed: int, first: Mapping[str, Tensor]) -> str:
    """FedAvg in thirty lines; returns the hash of the final weights."""
    state, module = dict(first), parts.module
    pixels = [parts.dataset.train.pixels[torch.from_numpy(share).sort().values] for share in parts.shares]
    for round_ in range(1, rounds + 1):
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for client, own in enumerate(pixels):
            seed_everything(derive_seed(seed, "client", round_, client), verbose=False)
            module.load_state_dict(state)
            optimizer = module.configure_optimizers()
            for _ in range(epochs):
                order = torch.randperm(len(own))
                torch.empty((), dtype=torch.int64).random_()  # a DataLoader's draw for its workers
                for batch in order.split(BATCH):
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


def federated(cell: Cell, first: Mapping[str, Tensor], workers: int) -> str:
    """The same by fedlight, as a cell runs it, in one process or in several."""
    settings, parts = cell.settings, cell.parts
    parts.module.load_state_dict(first)
    shutil.rmtree(cell.folder, ignore_errors=True)
    with ProgressBars("round", settings.rounds) as bars:
        store = Store(cell.folder / "checkpoint", cell.folder.name)
        federator = Federator(parts.method, parts.slices, parts.module, store)
        store.resume(federator.keeping)
        callbacks = [bars, LambdaCallback(on_train_batch_end=lambda *_: None)]
        here = parts.updater(federator, settings, callbacks)

        def order(task: Task) -> Order:
            return Order(cell.folder, cell.config, task, store.files(task.client))

        def train(tasks: list[Task]) -> None:
            if workers == 1:
                for task in tasks:
                    here(task)
                return
            crew = crew_of(workers - 1)
            crew.get_ready(cell.folder, cell.config)
            for task, files in crew.train(tasks, here, order, lambda _: bars.end_update(), lambda: None):
                store.adopt(task.client, files)

        federation = Federation(settings.rounds, CLIENTS, 1.0, 0.0, settings.seed)
        for done in federate(federator, train, federation):
            store.commit(Saved(done.round, federator.state, {}))
        return state_sha256(federator.state)


def main() -> None:
    given = parser(__doc__).parse_args()
    quick = given.quick
    works = [  # model and data, steps an update, local epochs, rounds, repeats
        ("tiny UNet, digits", ["model=tiny"], 5, 1, 2, 9 if quick else 25),
        ("tiny UNet, digits", ["model=tiny"], 100, 5, 1, 2 if quick else 5),
        ("paper's UNet, Fashion-MNIST", ["model=paper", "data=fmnist"], 5, 1, 1, 1 if quick else 5),
    ]
    rows, ratios, figures = [], {}, {}
    for what, chosen, steps, epochs, rounds, repeats in works:
        config, settings = composed(
            *(*chosen, f"clients={CLIENTS}", f"rounds={rounds}", f"epochs={epochs}"),
            *(f"data.batch_size={BATCH}", f"data.limit={CLIENTS * BATCH * steps // epochs}"),
            *("evaluation.samples=0", "logger=none"),
        )
        parts = build(config, settings)
        resolved = OmegaConf.to_container(config, resolve=True)
        first = {name: tensor.clone() for name, tensor in parts.module.state_dict().items()}
        hashes: set[str] = set()
        with tempfile.TemporaryDirectory() as folder:
            cell = Cell(Path(folder, "cell"), resolved, settings, parts)

            def note(act: Callable[..., str], *given: Any) -> None:
                hashes.add(act(*given))  # noqa: B023

            seconds = in_turns(
                {
                    "bare": partial(note, bare, parts, rounds, epochs, settings.seed, first),
                    "fedlight": partial(note, federated, cell, first, 1),
                    "at once": partial(note, federated, cell, first, WORKERS),
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
    dismiss()
    show(
        f"rounds of FULL, {CLIENTS} clients, batch {BATCH}, one thread: milliseconds a local update",
        ["", "bare loop", "fedlight", "more", "ratio", f"ratio, {WORKERS} processes"],
        rows,
    )
    write(given.out, ratios, {"seconds": figures})


if __name__ == "__main__":
    main()
