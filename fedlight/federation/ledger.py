"""The ledger: counts every payload when the server sends or receives it."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal

from fedlight.federation.messages import Payload

Direction = Literal["down", "up"]


@dataclass(frozen=True)
class Entry:
    """One payload that was sent once.

    Attributes:
        round: 1..R.
        client: 0..K-1.
        direction: `down`, server to client, or `up`, client to server.
        slice: the slice's name, `algorithm` for auxiliary state, or `aggregation` for keys and shares.
        params: number of scalars that the payload encodes.
        bytes: size of the payload.
    """

    round: int
    client: int
    direction: Direction
    slice: str
    params: int
    bytes: int


class Ledger:
    """Counts the traffic of a cell.

    Attributes:
        entries: of all closed rounds, by round, client and direction.
        params, bytes: sums of the parameters by direction, and of all bytes.
        visits: number of models that FULL would have sent, both ways, so far.
    """

    def __init__(self) -> None:
        self._open: list[Entry] = []
        self.restore([], 0)

    def add(self, round_: int, client: int, direction: Direction, payloads: Mapping[str, Payload]) -> None:
        """Counts the payloads of one message."""
        self._open += [
            Entry(round_, client, direction, name, payload.params, payload.bytes)
            for name, payload in payloads.items()
        ]

    def add_bytes(self, round_: int, client: int, direction: Direction, name: str, size: int) -> None:
        """Counts bytes that stand for no parameter of the model."""
        self._open.append(Entry(round_, client, direction, name, 0, size))

    def withdraw(self, client: int) -> None:
        """Removes the entries of the open round of a client that its broadcast did not reach."""
        self._open = [entry for entry in self._open if entry.client != client]

    def withdraw_updates(self) -> None:
        """Removes what was received in the open round."""
        self._open = [entry for entry in self._open if entry.direction == "down"]

    def finish_round(self, visits: int) -> list[Entry]:
        """Closes the round; returns its entries by client, downlink first."""
        closed = sorted(self._open, key=lambda entry: (entry.client, entry.direction == "up"))
        self._close(closed)
        self.visits += visits
        self._open = []
        return closed

    def discard_round(self) -> None:
        """Removes the entries of the open round, which starts again."""
        self._open = []

    def totals(self, model_params: int) -> dict[str, int | float]:
        """Sums over all closed rounds, compared with FULL for the same clients.

        Args:
            model_params: N, the number of scalars of the model.
        """
        down, up = self.params["down"], self.params["up"]
        full = model_params * self.visits
        return {
            "params_down": down,
            "params_up": up,
            "params_total": down + up,
            "bytes_total": self.bytes,
            "params_full": full,
            "reduction": 1 - (down + up) / full if full else 0.0,
        }

    def rows(self) -> list[tuple[Any, ...]]:
        """The entries as JSON values, for the checkpoint."""
        return [astuple(entry) for entry in self.entries]

    def restore(self, rows: Iterable[Iterable[Any]], visits: int) -> None:
        """Restores the entries that `rows` returned."""
        self.entries: list[Entry] = []
        self.params = {"down": 0, "up": 0}
        self.bytes, self.visits = 0, visits
        self._close([Entry(*row) for row in rows])
        self.discard_round()

    def _close(self, entries: list[Entry]) -> None:
        self.entries += entries
        for entry in entries:
            self.params[entry.direction] += entry.params
            self.bytes += entry.bytes
