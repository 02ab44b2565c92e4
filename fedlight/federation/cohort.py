"""The cohort of a round: its clients, the slices that each reports, and the clients that drop out."""

from dataclasses import dataclass

import numpy as np

from fedlight.federation.method import Method, Split
from fedlight.runtime.seeds import stream
from fedlight.runtime.system_random import SystemGenerator


@dataclass(frozen=True)
class Task:
    """The task of one client in one round.

    Attributes:
        round: 1..R.
        client: 0..K-1.
        uplink: slices to report.
        drops_out: the client receives its broadcast and never reports (a simulated fault).
    """

    round: int
    client: int
    uplink: tuple[str, ...]
    drops_out: bool = False


@dataclass(frozen=True)
class Participation:
    """Decides, together with the method, the cohort and the tasks of every round.

    Attributes:
        clients: K, 1 or more.
        fraction: C, the share of clients in each round, in (0, 1].
        dropout: probability that a participant never reports, in [0, 1].
        seed: decides every draw.
        poisson: each client takes part independently with probability C, so that cohorts vary in size and may
            be empty. The accounting of client-level privacy assumes this.
        secret: a Poisson cohort is drawn from the operating system's cryptographic generator, not from the
            seed.
    """

    clients: int
    fraction: float
    dropout: float
    seed: int
    poisson: bool = False
    secret: bool = False

    @property
    def cohort_size(self) -> int:
        """Clients in a round; their expected number where the cohort is Poisson."""
        return cohort_size(self.clients, self.fraction)

    def draw(self, method: Method, round_: int) -> tuple[list[int], list[Task]]:
        """The cohort of a round, 1..R, and its tasks, both in client order."""
        if self.poisson:
            rng = SystemGenerator() if self.secret else stream(self.seed, "participants", round_)
            cohort = draw_poisson(rng, self.clients, self.fraction)
        else:
            cohort = draw_cohort(self.seed, round_, self.clients, self.fraction)
        if method.pool:
            return cohort, [Task(round_, 0, tuple(method.uplink))]
        return cohort, assign_tasks(method, self.seed, round_, cohort, self.dropout)


def cohort_size(clients: int, fraction: float) -> int:
    """How many of K clients take part in each round: max(1, round(C K))."""
    return max(1, round(fraction * clients))


def draw_cohort(seed: int, round_: int, clients: int, fraction: float) -> list[int]:
    """The clients of a round, uniform without replacement, sorted."""
    size = cohort_size(clients, fraction)
    drawn = stream(seed, "participants", round_).choice(clients, size=size, replace=False)
    return sorted(int(client) for client in drawn)


def draw_poisson(rng: np.random.Generator | SystemGenerator, clients: int, rate: float) -> list[int]:
    """The clients of a round, each with probability `rate`, sorted."""
    drawn: list[int] = np.flatnonzero(rng.random(clients) < rate).tolist()
    return drawn


def assign_tasks(method: Method, seed: int, round_: int, cohort: list[int], dropout: float) -> list[Task]:
    """A task for each client of the cohort, in client order.

    Args:
        method: resolved over the model's slices.
        seed: the cell's seed.
        round_: 1..R.
        cohort: sorted client numbers.
        dropout: probability, in [0, 1], that a participant never reports.
    """
    uplinks = {client: tuple(method.uplink) for client in cohort}
    if method.split and len(cohort) > 1:
        uplinks = _assign_split(method.split, stream(seed, "split", round_), cohort)
    drops = {client: stream(seed, "dropout", round_, client).random() < dropout for client in cohort}
    return [Task(round_, client, uplinks[client], drops[client]) for client in cohort]


def _assign_split(split: Split, rng: np.random.Generator, cohort: list[int]) -> dict[int, tuple[str, ...]]:
    """Pairs the cohort at random and assigns the slices (FedDiffuse, USPLIT)."""
    shuffled = [int(client) for client in rng.permutation(cohort)]
    uplinks: dict[int, tuple[str, ...]] = {}
    for pair in zip(shuffled[::2], shuffled[1::2], strict=False):
        with_coin = rng.integers(2)
        for member, client in enumerate(pair):
            coin = (split.coin,) if member == with_coin else ()
            uplinks[client] = (split.either[member], *coin)
    if len(shuffled) % 2:
        uplinks[shuffled[-1]] = (split.either[rng.integers(2)], split.coin)
    return uplinks
