"""The round loop: choose, train, merge, account."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightning import LightningDataModule, LightningModule, Trainer, seed_everything

from fedlight.federation.cohort import Federation, Task
from fedlight.federation.federator import Federator
from fedlight.federation.ledger import Entry
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


def replay(federator: Federator, federation: Federation, rounds: int) -> Iterator[list[Entry]]:
    """Books the first `rounds` rounds again, as they were, and yields what crossed in each.

    The tasks follow from the seed alone, and so do first contacts and the ledger.
    """
    for round_ in range(1, rounds + 1):
        participants, tasks = federation.invite(federator.method, round_)
        for task in tasks:
            federator.book(task)
        yield federator.close_round(participants, tasks)


def local_update(
    task: Task,
    *,
    federator: Federator,
    seed: int,
    module: LightningModule,
    data: Callable[[int], LightningDataModule],
    make_trainer: Callable[[], Trainer],
) -> None:
    """Does a task: E local epochs by a fresh Trainer, whose Federator callback loads and reports.

    It depends on the global slices, the client's private state and data, and on (seed, round, client) alone.

    Args:
        task: what to do.
        federator: holds the global slices; must be a callback of the trainers made.
        seed: of the federation.
        module: the client model; its state is replaced before the update.
        data: the data module of a client, by its number.
        make_trainer: a fresh Trainer for one local update.

    Raises:
        Diverged: the client's loss or weights left the finite numbers.
    """
    federator.task = task
    seed_everything(derive_seed(seed, "client", task.round, task.client), verbose=False)
    make_trainer().fit(module, datamodule=data(task.client))


def federate(
    federator: Federator,
    train: Callable[[list[Task]], None],
    federation: Federation,
    *,
    done: int = 0,
) -> Iterator[Round]:
    """Runs the rounds one by one (FedAvg, arXiv 1602.05629, with FedDiffuse's slices).

    Args:
        federator: holds the global model.
        train: does the local updates of tasks, in any order, so that the federator has their reports.
        federation: rounds, clients and their participation.
        done: rounds that the federator has behind it.

    Yields:
        Each round after its merge.

    Raises:
        Diverged: a client's loss left the finite numbers.
    """
    for round_ in range(done + 1, federation.rounds + 1):
        start = time.perf_counter()
        participants, tasks = federation.invite(federator.method, round_)
        for task in tasks:
            if task.drops_out:
                federator.lose(task)
        train([task for task in tasks if not task.drops_out and not federator.has_report(task)])
        for task in tasks:
            federator.book(task)
        trained = time.perf_counter()
        reporters = federator.merge()
        merged = time.perf_counter()

        total = sum(images for images, _ in reporters.values())
        yield Round(
            round=round_,
            train_loss=sum(n_k * loss for n_k, loss in reporters.values()) / total if total else None,
            client_losses={client: loss for client, (_, loss) in reporters.items()},
            participants=len(participants),
            exchange=federator.close_round(participants, tasks),
            training=trained - start,
            merging=merged - trained,
        )
