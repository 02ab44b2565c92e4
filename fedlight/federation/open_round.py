"""One round while it is open: the clients that it awaits, and the sums of their updates."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlight.federation.aggregate import WeightedMean
from fedlight.federation.cohort import Task
from fedlight.federation.ledger import Direction, Entry
from fedlight.federation.messages import State, Update
from fedlight.federation.secure.secure_sum import SliceSums


@dataclass(frozen=True)
class Outcome:
    """What the server knows of a round after its step.

    Attributes:
        round: 1..R.
        train_loss: mean over the updates, weighted by data size, or None where none is known.
        client_losses: client: its mean training loss of an image over its last local epoch.
        cohort: number of clients that took part.
        reports: number of updates that count.
        num_examples: client: the number of training images that it reported with an update that counts.
        exchange: the ledger's entries of the round.
        merging: seconds that the server spent in aggregation and step.
    """

    round: int
    train_loss: float | None
    client_losses: dict[int, float]
    cohort: int
    reports: int
    num_examples: dict[int, int]
    exchange: list[Entry]
    merging: float


class OpenRound:
    """Collects the updates of one round.

    Updates arrive in any order and are released in client order, so that their sums have the same bits. An
    update is kept only until those of all awaited clients with a smaller number have arrived.

    Args:
        cohort: the clients of the round.
        tasks: their tasks; a client that drops out is not awaited.
        last_rounds: client: the round before this one in which it last took part.
        reported: tensors with the dtypes of the slices that clients report.
        aux_like: tensors with the dtypes of the auxiliary state that clients report.
        sums: takes the updates under secure aggregation.

    Attributes:
        cohort: the clients of the round.
        planned: client: the slices that it is to report.
        waiting: client: its update, which has arrived and is not yet added.
        mean: weighted mean of the reported slices.
        aux: weighted mean of the reported auxiliary state.
        reports: client: n_k and training loss of each update that was added.
        sums: of the updates under secure aggregation; None without.
        masks: slice: the sum of the masks in its sum; None where nothing is masked, as in a simulation.
        lost: why the round counts no update, empty where it counts them.
        mask_bytes: bytes of keys and shares, by client and direction, as a transport has counted them.
        within_clip: whether each update that was added was within the clip of client-level privacy.
        unsent: clients that their broadcast did not reach.
        memory_lost: whether a client reported that its memory is lost.
    """

    def __init__(
        self,
        cohort: list[int],
        tasks: list[Task],
        last_rounds: Mapping[int, int],
        reported: State,
        aux_like: State,
        sums: SliceSums | None = None,
    ) -> None:
        self.cohort = cohort
        self.waiting: dict[int, Update] = {}
        self.mean = WeightedMean(reported)
        self.aux = WeightedMean(aux_like)
        self.reports: dict[int, tuple[int, float | None]] = {}
        self.sums = sums
        self.masks: dict[str, NDArray[np.uint64]] | None = None
        self.lost = ""
        self.mask_bytes: dict[tuple[int, Direction], int] = {}
        self.within_clip: list[bool] = []
        self.planned = {task.client: task.uplink for task in tasks}
        self._loss: tuple[float, int] | None = None
        self.unsent: set[int] = set()
        self.memory_lost = False
        self._awaited = sorted(task.client for task in tasks if not task.drops_out)
        self._previous = {task.client: last_rounds.get(task.client, 0) for task in tasks}

    def receive(self, update: Update) -> list[Update]:
        """Takes an update; returns those that can be added now, in client order."""
        self.waiting[update.client] = update
        ready = []
        while self._awaited and self._awaited[0] in self.waiting:
            ready.append(self.waiting.pop(self._awaited.pop(0)))
        return ready

    def take_waiting(self) -> list[Update]:
        """Removes and returns the updates that were not added yet, in client order."""
        rest = [self.waiting[client] for client in sorted(self.waiting)]
        self.waiting = {}
        return rest

    def missing(self) -> dict[int, int]:
        """Client: the earlier round in which it last took part, 0 for never; of those that did not report."""
        return {client: self._previous[client] for client in self.awaited}

    def note_lost_memory(self, client: int) -> None:
        """Treats a client as one that has never taken part."""
        self.memory_lost = True
        self._previous[client] = 0

    def add_loss(self, loss: float, weight: int) -> None:
        """Adds a sum of losses times weights, and that of the weights, of several clients."""
        before = self._loss or (0.0, 0)
        self._loss = before[0] + loss, before[1] + weight

    @property
    def awaited(self) -> set[int]:
        """The clients whose update has not arrived and is awaited."""
        return set(self._awaited).difference(self.waiting)

    @property
    def received(self) -> set[int]:
        """The clients whose update is added or waits for that."""
        return {*self.waiting, *self.reports}

    @property
    def train_loss(self) -> float | None:
        """Mean loss over the reports, weighted by n_k; None where no loss is known."""
        if self._loss:
            return self._loss[0] / self._loss[1]
        known = [(images, loss) for images, loss in self.reports.values() if loss is not None]
        total = sum(images for images, _ in known)
        return sum(images * loss for images, loss in known) / total if total else None

    @property
    def client_losses(self) -> dict[int, float]:
        """Client: its loss, where it is known."""
        return {client: loss for client, (_, loss) in self.reports.items() if loss is not None}
