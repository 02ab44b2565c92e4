"""What a round costs around its steps: fedlight against a bare PyTorch loop of the same work.

python benchmarks/round.py [--quick] [--out FILE.json]

Both train the same model by FULL, with the same draws: their final weights must be equal bit for
bit, else the benchmark fails. fedlight's time holds all that a round brings: Trainers, callbacks, reports
through files, the merge, the ledger, the checkpoint. In updates of 5 steps a client has hardly any work.
"""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import composed, in_turns, parser, show, write
from lightning import seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from fedlight.data.client_data import ClientData
from fedlight.federation.federator import Federator
from fedlight.federation.rounds import federate
from fedlight.federation.store import Saved, Store
from fedlight.federation.tasks import Federation
from fedlight.parts import Parts, build
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.seeds import derive_seed
from fedlight.tracking.progress import ProgressBars

CLIENTS, BATCH = 4, 16


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


def federated(parts: Parts, rounds: int, seed: int, first: Mapping[str, Tensor]) -> str:
    """The same by fedlight, as a cell runs it."""
    parts.module.load_state_dict(first)
    with tempfile.TemporaryDirectory() as folder, ProgressBars("round", rounds) as bars:
        store = Store(Path(folder), "benchmark")
        federator = Federator(parts.method, parts.slices, parts.module, store)
        store.resume(federator.keeping)
        callbacks = [federator, bars, LambdaCallback(on_train_batch_end=lambda *_: None)]
        for done in federate(
            federator,
            parts.module,
            lambda client: ClientData(parts.dataset.train.pixels, parts.shares[client], BATCH),
            partial(parts.make_trainer, callbacks=callbacks),
            Federation(rounds, CLIENTS, 1.0, 0.0, seed),
        ):
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
        first = {name: tensor.clone() for name, tensor in parts.module.state_dict().items()}
        hashes = set()
        seconds = in_turns(
            {
                "bare": lambda: hashes.add(bare(parts, rounds, epochs, settings.seed, first)),  # noqa: B023
                "fedlight": lambda: hashes.add(federated(parts, rounds, settings.seed, first)),  # noqa: B023
            },
            repeats,
        )
        assert len(hashes) == 1, "the two did not compute the same"
        ratio = seconds["fedlight"] / seconds["bare"]
        updates = rounds * CLIENTS
        rows.append(
            [
                f"{what}, {steps} steps",
                *(f"{1e3 * seconds[name] / updates:.1f}" for name in ("bare", "fedlight")),
                f"{1e3 * (seconds['fedlight'] - seconds['bare']) / updates:.1f}",
                f"{ratio:.3f}x",
            ]
        )
        ratios[f"round, {what}, {steps} steps, bare over fedlight"] = 1 / ratio
        figures[f"{what}, {steps} steps"] = seconds
    show(
        f"rounds of FULL, {CLIENTS} clients, batch {BATCH}, one thread: milliseconds a local update",
        ["", "bare loop", "fedlight", "more", "ratio"],
        rows,
    )
    write(given.out, ratios, {"seconds": figures})


if __name__ == "__main__":
    main()
