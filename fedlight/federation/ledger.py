"""The ledger: every payload that crosses, counted as it is sent and as it arrives."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlight.federation.messages import Payload

Direction = Literal["down", "up"]
DIRECTIONS: tuple[Direction, Direction] = ("down", "up")


@dataclass(frozen=True)
class Entry:
    """One payload crossing once.

    Attributes:
        round: 1..R.
        client: 0..K-1.
        direction: `down`, server to client, or `up`, client to server.
        slice: the slice's name, or `algorithm` for what an algorithm adds.
        params: number of scalars that the payload stands for.
        bytes: size of the payload.
    """

    round: int
    client: int
    direction: Direction
    slice: str
    params: int
    bytes: int


class Ledger:
    """The account of a cell's exchange.

    Attributes:
        entries: of all rounds that are closed, by round, client and direction.
        visits: downlinks and uplinks that FULL would have made so far.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.visits = 0
        self._open: list[Entry] = []

    def add(self, round_: int, client: int, direction: Direction, payloads: Mapping[str, Payload]) -> None:
        """Counts the payloads of one message."""
        self._open += [
            Entry(round_, client, direction, name, payload.params, payload.bytes)
            for name, payload in payloads.items()
        ]

    def close_round(self, visits: int) -> list[Entry]:
        """Closes the round; returns its entries by client, downlink first."""
        closed = sorted(self._open, key=lambda entry: (entry.client, entry.direction == "up"))
        self.entries += closed
        self.visits += visits
        self._open = []
        return closed

    def discard_round(self) -> None:
        """Forgets the messages of a round that is begun anew."""
        self._open = []

    def totals(self, model_params: int) -> dict[str, int | float]:
        """The account so far beside what FULL would have exchanged with the same clients.

        Args:
            model_params: N, the scalars of a whole model.
        """
        down, up = (
            sum(entry.params for entry in self.entries if entry.direction == direction)
            for direction in DIRECTIONS
        )
        full = model_params * self.visits
        return {
            "params_down": down,
            "params_up": up,
            "params_total": down + up,
            "bytes_total": sum(entry.bytes for entry in self.entries),
            "params_full": full,
            "reduction": 1 - (down + up) / full if full else 0.0,
        }

    def to_tensor(self, names: Sequence[str]) -> Tensor:
        """The entries as int64, shape (n, 6), for the checkpoint; a slice is its position in `names`."""
        rows = [astuple(entry) for entry in self.entries]
        numbers = [
            (r, c, DIRECTIONS.index(d), names.index(s), params, size) for r, c, d, s, params, size in rows
        ]
        return torch.tensor(numbers, dtype=torch.int64).reshape(-1, 6)

    def restore(self, rows: Tensor, names: Sequence[str], visits: int) -> None:
        """The inverse of `to_tensor`."""
        self.entries = [
            Entry(round_, client, DIRECTIONS[direction], names[slice_], params, size)
            for round_, client, direction, slice_, params, size in rows.tolist()
        ]
        self.visits = visits
        self._open = []
