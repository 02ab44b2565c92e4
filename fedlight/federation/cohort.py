"""The tasks of a round: who takes part, who reports which slice, who drops out."""

from dataclasses import dataclass

import numpy as np

from fedlight.federation.method import Method, Split
from fedlight.runtime.seeds import stream


@dataclass(frozen=True)
class Task:
    """What one client is to do in one round.

    Attributes:
        round: 1..R.
        client: 0..K-1.
        uplink: slices to report.
        drops_out: the client receives its downlink but never reports; its work is lost.
    """

    round: int
    client: int
    uplink: tuple[str, ...]
    drops_out: bool = False


@dataclass(frozen=True)
class Federation:
    """Who takes part: with the method, all that decides the tasks of every round.

    Attributes:
        rounds: R, 0 or more.
        clients: K, 1 or more.
        fraction: C, the share of clients in each round, in (0, 1].
        dropout: probability that a participant never reports, in [0, 1].
        seed: decides every draw of the federation.
    """

    rounds: int
    clients: int
    fraction: float
    dropout: float
    seed: int

    def invite(self, method: Method, round_: int) -> tuple[list[int], list[Task]]:
        """The participants of a round, 1..R, and the tasks to be done, both in client order."""
        participants = participants_of(self.seed, round_, self.clients, self.fraction)
        if method.pool:
            return participants, [Task(round_, 0, tuple(method.uplink))]
        return participants, deal_tasks(method, self.seed, round_, participants, self.dropout)


def participant_count(clients: int, fraction: float) -> int:
    """How many of K clients take part in each round: max(1, round(C K))."""
    return max(1, round(fraction * clients))


def participants_of(seed: int, round_: int, clients: int, fraction: float) -> list[int]:
    """The round's participants, uniform without replacement, sorted."""
    count = participant_count(clients, fraction)
    drawn = stream(seed, "participants", round_).choice(clients, size=count, replace=False)
    return sorted(int(client) for client in drawn)


def deal_tasks(method: Method, seed: int, round_: int, participants: list[int], dropout: float) -> list[Task]:
    """A task for each participant, in client order.

    Args:
        method: resolved over the model's slices.
        seed: the cell's seed.
        round_: 1..R.
        participants: sorted client numbers.
        dropout: probability, in [0, 1], that a participant never reports.
    """
    uplinks = {client: tuple(method.uplink) for client in participants}
    if method.split and len(participants) > 1:
        uplinks = _deal_split(method.split, stream(seed, "split", round_), participants)
    drops = {client: stream(seed, "dropout", round_, client).random() < dropout for client in participants}
    return [Task(round_, client, uplinks[client], drops[client]) for client in participants]


def _deal_split(
    split: Split, rng: np.random.Generator, participants: list[int]
) -> dict[int, tuple[str, ...]]:
    """Pairs the participants at random and deals the slices (FedDiffuse, USPLIT)."""
    order = [int(client) for client in rng.permutation(participants)]
    uplinks: dict[int, tuple[str, ...]] = {}
    for pair in zip(order[::2], order[1::2], strict=False):
        with_coin = rng.integers(2)
        for member, client in enumerate(pair):
            coin = (split.coin,) if member == with_coin else ()
            uplinks[client] = (split.either[member], *coin)
    if len(order) % 2:
        uplinks[order[-1]] = (split.either[rng.integers(2)], split.coin)
    return uplinks
