"""The ledger: every tensor that crosses between federator and clients, counted where it crosses."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Direction = Literal["down", "up"]


@dataclass(frozen=True)
class Entry:
    """One slice crossing once.

    Attributes:
        round: 1..R.
        client: 0..K-1.
        direction: `down`, federator to client, or `up`, client to federator.
        slice: the slice's name.
        params: number of scalars that crossed.
        bytes: their size.
    """

    round: int
    client: int
    direction: Direction
    slice: str
    params: int
    bytes: int


class Ledger:
    """The running account of a cell's exchange.

    Attributes:
        round: the entries of the round under way.
        params: scalars that crossed so far, by direction.
        bytes: bytes that crossed so far.
        visits: downlinks and uplinks that FULL would have made so far.
    """

    def __init__(self) -> None:
        self.visits = 0
        self.round: list[Entry] = []
        self.params: dict[Direction, int] = {"down": 0, "up": 0}
        self.bytes = 0

    def book(
        self, round_: int, client: int, direction: Direction, slice_: str, tensors: Iterable[Tensor]
    ) -> None:
        """Books the tensors of one slice as they cross."""
        sizes = [(tensor.numel(), tensor.element_size()) for tensor in tensors]
        params = sum(count for count, _ in sizes)
        size = sum(count * width for count, width in sizes)
        self.round.append(Entry(round_, client, direction, slice_, params, size))
        self.params[direction] += params
        self.bytes += size

    def close_round(self) -> list[Entry]:
        """The entries since the last close, by client, downlink first."""
        entries = sorted(self.round, key=lambda entry: (entry.client, entry.direction == "up"))
        self.round = []
        return entries

    def totals(self, model_params: int) -> dict[str, int | float]:
        """The account so far beside what FULL would have exchanged with the same clients.

        Args:
            model_params: N, the scalars of a whole model.
        """
        total = self.params["down"] + self.params["up"]
        full = model_params * self.visits
        return {
            "params_down": self.params["down"],
            "params_up": self.params["up"],
            "params_total": total,
            "bytes_total": self.bytes,
            "params_full": full,
            "reduction": 1 - total / full if full else 0.0,
        }
