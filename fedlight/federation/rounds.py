"""The round loop: choose, train, merge, account."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightning import LightningDataModule, LightningModule, Trainer, seed_everything

from fedlight.federation.federator import Federator
from fedlight.federation.ledger import Entry
from fedlight.federation.tasks import Task, deal_tasks, participants_of
from fedlight.runtime.seeds import derive_seed


@dataclass(frozen=True)
class Round:
    """What one round came to.

    Attributes:
        round: 1..R.
        train_loss: mean over the reporters, weighted by data size, or None where nobody reported.
        client_losses: reporter -> its mean training loss an image over its last local epoch.
        participants: number of clients invited.
        exchange: every slice that crossed.
        training: seconds spent in local updates.
        merging: seconds spent merging.
    """

    round: int
    train_loss: float | None
    client_losses: dict[int, float]
    participants: int
    exchange: list[Entry]
    training: float
    merging: float


def federate(
    federator: Federator,
    module: LightningModule,
    data: Callable[[int], LightningDataModule],
    make_trainer: Callable[[], Trainer],
    *,
    rounds: int,
    clients: int,
    fraction: float,
    dropout: float,
    seed: int,
    on_tasks: Callable[[list[Task]], None] = lambda tasks: None,
) -> Iterator[Round]:
    """Runs the rounds one by one (FedAvg, arXiv 1602.05629, with FedDiffuse's slices).

    Args:
        federator: holds the global model; must be a callback of the trainers made.
        module: the client model, its state replaced before each local update.
        data: the data module of a client, by its number.
        make_trainer: a fresh Trainer for one local update of E epochs.
        rounds: R, 0 or more.
        clients: K, 1 or more.
        fraction: C, the share of clients in each round, in (0, 1].
        dropout: probability that a participant never reports, in [0, 1].
        seed: decides every draw of the federation.
        on_tasks: told the tasks of each round before they start.

    Yields:
        Each round after its merge.

    Raises:
        Diverged: a client's loss left the finite numbers.
    """
    for round_ in range(1, rounds + 1):
        participants = participants_of(seed, round_, clients, fraction)
        if federator.method.pool:
            tasks = [Task(round_, 0, tuple(federator.method.uplink))]
        else:
            tasks = deal_tasks(federator.method, seed, round_, participants, dropout)
        on_tasks(tasks)

        start = time.perf_counter()
        for task in tasks:
            if task.drops_out:
                federator.lose(task)
            else:
                federator.task = task
                seed_everything(derive_seed(seed, "client", round_, task.client), verbose=False)
                make_trainer().fit(module, datamodule=data(task.client))
        trained = time.perf_counter()
        reporters = federator.merge()
        merged = time.perf_counter()
        reports = len(participants) if federator.method.pool else len(reporters)
        federator.ledger.visits += len(participants) + reports

        total = sum(images for images, _ in reporters.values())
        yield Round(
            round=round_,
            train_loss=sum(n_k * loss for n_k, loss in reporters.values()) / total if total else None,
            client_losses={client: loss for client, (_, loss) in reporters.items()},
            participants=len(participants),
            exchange=federator.ledger.close_round(),
            training=trained - start,
            merging=merged - trained,
        )
