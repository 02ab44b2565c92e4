"""A site: the clients of one machine, with their setup, their memory and their finished updates."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlight.federation.checkpoint import ClientMemory
from fedlight.federation.client import ClientSetup, Memory, evaluate, local_updates
from fedlight.federation.grouping import EvaluationGroup, Group, is_evaluation
from fedlight.federation.journal import Journal, Receipt
from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update, from_bytes, to_bytes
from fedlight.runtime.errors import Damaged, MemoryLost

GROUPS_KEPT = 3  # whose updates a process holds until they are read


def client_memory(folder: Path, cell: str, repair: bool = True) -> ClientMemory:
    """Opens the memory of the clients of a site."""
    return ClientMemory(folder / "clients", cell, repair)


class Site:
    """Answers the messages of the server for the clients of one machine.

    Several processes may share one folder.

    Args:
        cell: id of the federation.
        setup: of its clients.
        folder: of memory and finished updates; the server never reads it.
    """

    def __init__(self, cell: str, setup: ClientSetup, folder: Path) -> None:
        self.cell = cell
        self.setup = setup
        self.folder = folder
        self.memory = client_memory(folder, cell)
        self.journal = Journal(folder / "updates")
        self._made: dict[Receipt, Update] = {}  # of the last groups, in the order of their groups

    def answer(self, request: Group | EvaluationGroup) -> list[Receipt | None] | list[Scores]:
        """Answers the messages of a group."""
        return self.evaluate_group(request) if is_evaluation(request) else self.update(request)

    def update(self, group: Sequence[Broadcast]) -> list[Receipt | None]:
        """Does the local updates of a group of clients, unless the journal has all of them.

        Each client's memory is stored, then its update. The clients of a group always train together, so that
        their updates have the same bits after a restart.

        Args:
            group: broadcasts of one round.

        Returns:
            The receipt of each stored update, None where a client drops out.

        Raises:
            MemoryLost: a client's memory is missing or damaged.
        """
        self.journal.open_round(group[0].round)
        while len(self._made) > GROUPS_KEPT * len(group):
            del self._made[next(iter(self._made))]
        receipts = [self._find(broadcast) for broadcast in group]
        if all(receipts):
            return receipts
        receipts = []
        for broadcast, (update, hash_) in zip(group, self.train(group), strict=True):
            if update is None:
                receipts.append(None)
                continue
            receipt = self.journal.add(broadcast.client, to_bytes(update), hash_)
            receipts.append(receipt)
            if len(group) > 1:
                self._made[receipt] = update
        return receipts

    def read(self, receipt: Receipt) -> Update:
        """An update from its receipt; those of the last groups of this process need not be decoded.

        Raises:
            Damaged: the stored bytes are not those that were written.
        """
        if receipt in self._made:
            return self._made.pop(receipt)
        update: Update = from_bytes(receipt.read())
        return update

    def discard(self) -> None:
        """Frees the updates of the last groups, which another process reads from the journal."""
        self._made = {}

    def train(self, group: Sequence[Broadcast]) -> list[tuple[Update | None, str | None]]:
        """Does the local updates of a group and stores the clients' memory.

        Returns:
            For each client the update, None where it drops out; and the hash of its memory, None where there
            is none.

        Raises:
            MemoryLost: a client's memory is missing or damaged.
        """
        memories = [self._read_memory(broadcast.client, broadcast.previous) for broadcast in group]
        trained = []
        for broadcast, (update, memory) in zip(
            group, local_updates(group, memories, self.setup), strict=True
        ):
            hash_ = None
            if self.setup.keeps_memory:
                hash_ = self.memory.write(broadcast.client, broadcast.round, memory, broadcast.previous)
            trained.append((update, hash_))
        return trained

    def evaluate(self, request: Evaluation) -> Scores:
        """Evaluates the model of a client; one that has never taken part holds the global model.

        Raises:
            MemoryLost: the client's memory is missing or damaged.
        """
        return self.evaluate_group([request])[0]

    def evaluate_group(self, requests: Sequence[Evaluation]) -> list[Scores]:
        """Evaluates the models of several clients, whose images are drawn in one computation.

        Raises:
            MemoryLost: a client's memory is missing or damaged.
        """
        memories = [self._read_memory(request.client, request.previous) for request in requests]
        return evaluate(requests, memories, self.setup)

    def take_seconds(self) -> float:
        """Seconds of reading and writing files since the last call."""
        return self.memory.watch.take() + self.journal.watch.take()

    def _find(self, broadcast: Broadcast) -> Receipt | None:
        """The receipt of an update that is finished, and whose memory is undamaged."""
        receipt = self.journal.find(broadcast.client)
        if receipt and self._has_memory(receipt, broadcast.client, broadcast.round):
            return receipt
        return None

    def _has_memory(self, receipt: Receipt, client: int, round_: int) -> bool:
        """Whether the memory that belongs to a finished update is undamaged."""
        try:
            if receipt.memory is not None:
                self.memory.read(client, round_, receipt.memory)
            return True
        except Damaged as error:
            print(f"fedlight: checkpoint: {error}; its client trains once more", file=sys.stderr)
            return False

    def _read_memory(self, client: int, round_: int) -> Memory:
        """The client's memory after `round_`, in which it last took part; empty where that is 0."""
        if not (round_ and self.setup.keeps_memory):
            return {}
        try:
            return self.memory.read(client, round_)
        except Damaged as error:
            raise MemoryLost(str(error)) from error
