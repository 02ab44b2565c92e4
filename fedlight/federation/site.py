"""A place where clients live: their setup, their memory, and the updates that they have done."""

import sys
from functools import cached_property
from pathlib import Path

from fedlight.federation.checkpoint import ClientMemory
from fedlight.federation.client import ClientSetup, Memory, evaluate, local_update
from fedlight.federation.journal import Journal, Receipt
from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update, to_bytes
from fedlight.runtime.errors import Damaged, MemoryLost


def client_memory(folder: Path, cell: str, repair: bool = True) -> ClientMemory:
    """The memory of the clients of a site."""
    return ClientMemory(folder / "clients", cell, repair)


class Site:
    """Answers the messages of the server for the clients of one machine.

    Several processes may share one folder.

    Args:
        cell: id of the federation.
        setup: of its clients.
        folder: where memory and finished updates are kept; the server never looks into it.
    """

    def __init__(self, cell: str, setup: ClientSetup, folder: Path) -> None:
        self.cell = cell
        self.setup = setup
        self.folder = folder
        self.memory = client_memory(folder, cell)
        self.journal = Journal(folder / "updates")

    @cached_property
    def _keeps(self) -> bool:
        return self.setup.keeps_memory

    def update(self, broadcast: Broadcast) -> Receipt | None:
        """Does a local update, or finds it done: the client's memory is stored first, then the update.

        Returns:
            Where the update is, or None where the client drops out.

        Raises:
            MemoryLost: what the client kept is gone.
        """
        round_, client = broadcast.round, broadcast.client
        self.journal.open_round(round_)
        if (done := self.journal.find(client)) and self._is_whole(done, client, round_):
            return done
        update, hash_ = self.train(broadcast)
        return None if update is None else self.journal.add(client, to_bytes(update), hash_)

    def train(self, broadcast: Broadcast) -> tuple[Update | None, str | None]:
        """Does a local update and stores the client's memory.

        Returns:
            The update, None where the client drops out; and the hash of the memory, None where there is none.

        Raises:
            MemoryLost: what the client kept is gone.
        """
        client = broadcast.client
        memory = self._recall(client, broadcast.previous)
        update, memory = local_update(broadcast, memory, self.setup)
        if not self._keeps:
            return update, None
        return update, self.memory.write(client, broadcast.round, memory, broadcast.previous)

    def evaluate(self, request: Evaluation) -> Scores:
        """Evaluates the model of a client; one that has never taken part holds the global model.

        Raises:
            MemoryLost: what the client kept is gone.
        """
        return evaluate(request, self._recall(request.client, request.previous), self.setup)

    def take_seconds(self) -> float:
        """Seconds spent on files since the last call."""
        return self.memory.watch.take() + self.journal.watch.take()

    def _is_whole(self, done: Receipt, client: int, round_: int) -> bool:
        """Whether the memory that belongs to a finished update is there."""
        try:
            if done.memory is not None:
                self.memory.read(client, round_, done.memory)
            return True
        except Damaged as error:
            print(f"fedlight: checkpoint: {error}; its client trains once more", file=sys.stderr)
            return False

    def _recall(self, client: int, round_: int) -> Memory:
        """What the client kept when it last took part, in round `round_`; nothing where that is 0."""
        if not (round_ and self._keeps):
            return {}
        try:
            return self.memory.read(client, round_)
        except Damaged as error:
            raise MemoryLost(str(error)) from error
