"""A site: the clients of one machine, with their setup, their memory and their finished updates."""

import sys
from pathlib import Path

from fedlight.federation.checkpoint import ClientMemory
from fedlight.federation.client import ClientSetup, Memory, evaluate, local_update
from fedlight.federation.journal import Journal, Receipt
from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update, to_bytes
from fedlight.runtime.errors import Damaged, MemoryLost


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

    def answer(self, message: Broadcast | Evaluation) -> Receipt | Scores | None:
        """Answers any message of the server."""
        return self.evaluate(message) if isinstance(message, Evaluation) else self.update(message)

    def update(self, broadcast: Broadcast) -> Receipt | None:
        """Does a local update unless the journal has it; stores the client's memory, then the update.

        Returns:
            The receipt of the stored update, or None where the client drops out.

        Raises:
            MemoryLost: the client's memory is missing or damaged.
        """
        round_, client = broadcast.round, broadcast.client
        self.journal.open_round(round_)
        if (receipt := self.journal.find(client)) and self._has_memory(receipt, client, round_):
            return receipt
        update, hash_ = self.train(broadcast)
        return None if update is None else self.journal.add(client, to_bytes(update), hash_)

    def train(self, broadcast: Broadcast) -> tuple[Update | None, str | None]:
        """Does a local update and stores the client's memory.

        Returns:
            The update, None where the client drops out; and the hash of the memory, None where there is none.

        Raises:
            MemoryLost: the client's memory is missing or damaged.
        """
        client = broadcast.client
        memory = self._read_memory(client, broadcast.previous)
        update, memory = local_update(broadcast, memory, self.setup)
        if not self.setup.keeps_memory:
            return update, None
        return update, self.memory.write(client, broadcast.round, memory, broadcast.previous)

    def evaluate(self, request: Evaluation) -> Scores:
        """Evaluates the model of a client; one that has never taken part holds the global model.

        Raises:
            MemoryLost: the client's memory is missing or damaged.
        """
        return evaluate(request, self._read_memory(request.client, request.previous), self.setup)

    def take_seconds(self) -> float:
        """Seconds of reading and writing files since the last call."""
        return self.memory.watch.take() + self.journal.watch.take()

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
