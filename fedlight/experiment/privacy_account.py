"""The privacy account of a cell: the noise that a target epsilon needs, and the epsilon spent so far."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fedlight.config import CellConfig
from fedlight.data.client_data import poisson_rate
from fedlight.data.partition import Indices
from fedlight.experiment.mechanisms import CLIENT, EXAMPLE, RELEASES, make_participation
from fedlight.federation.method import Method
from fedlight.federation.trainer import count_batches
from fedlight.privacy.account import Account, calibrate


class PrivacyAccount:
    """What the noise and the sampling of a cell cost so far.

    A release is a round under client-level privacy, and a batch of a client under example-level
    privacy, where each client has an account of its own.

    Args:
        config: of the cell, with the section `privacy`.
        noise: multiplier of the noise.
        client_indices: the images of each client.
        method: resolved over the slices.
        checkpoint: the folder of the checkpoint, where releases with secret noise are counted.
    """

    def __init__(
        self,
        config: CellConfig,
        noise: float,
        client_indices: Sequence[Indices],
        method: Method,
        checkpoint: Path,
    ) -> None:
        assert config.privacy is not None
        self._privacy = config.privacy
        self._noise = noise
        self._fraction = config.fraction
        self._checkpoint = checkpoint
        self._schedule = SamplingSchedule(config, [len(indices) for indices in client_indices], method)
        self._account = cache(lambda rate: Account(noise, rate, self._privacy.delta))

    def epsilons(self, round_: int) -> list[float]:
        """Epsilon after a round: of each client under example-level privacy, else one number.

        Rounds that were repeated with fresh noise count again.
        """
        if self._privacy.name == CLIENT:
            releases = max(round_, self._count_releases(RELEASES))
            return [self._account(self._fraction).epsilon(releases)]
        spent = cache(lambda rate, steps: self._account(rate).epsilon(steps))
        updates = self._schedule.count_updates(round_)
        return [
            spent(rate, steps * max(updates[client], self._count_releases(f"{RELEASES}-{client:06d}")))
            for client, (rate, steps) in enumerate(self._schedule.sampling)
        ]

    def to_entry(self, epsilons: list[float]) -> dict[str, Any]:
        """The `privacy` entry of `result.json`; an infinite epsilon is the text `inf`."""
        privacy = self._privacy
        entry = {
            "kind": privacy.name,
            "epsilon": _as_json(max(epsilons)),
            "delta": privacy.delta,
            "noise": self._noise,
            "clip": _as_json(privacy.clip),
        }
        if privacy.name == CLIENT:
            return entry | {"noise_at": privacy.noise_at}
        return entry | {
            "draws": privacy.draws,
            "epsilon_clients": [_as_json(epsilon) for epsilon in epsilons],
        }

    def _count_releases(self, name: str) -> int:
        path = self._checkpoint / name
        return path.stat().st_size if path.exists() else 0


class SamplingSchedule:
    """Which clients train in which round under example-level privacy, and how their batches are sampled.

    Attributes:
        sampling: for each client, the probability that an image is in a batch, and the batches of an update,
            each of which gives a noisy gradient.
    """

    def __init__(self, config: CellConfig, sizes: list[int], method: Method) -> None:
        self._participation = make_participation(config)
        self._method = method
        self._rounds: list[list[int]] = []
        sizes = [sum(sizes)] if method.pool else sizes
        batch = config.data.batch_size
        batches = [count_batches(config.trainer, config.epochs, -(-n // batch)) for n in sizes]
        self.sampling = [(poisson_rate(n, batch), count) for n, count in zip(sizes, batches, strict=True)]

    def count_updates(self, round_: int) -> Counter[int]:
        """The number of updates of each client up to a round; one that dropped out is counted as well."""
        while len(self._rounds) < round_:
            _, tasks = self._participation.draw(self._method, len(self._rounds) + 1)
            self._rounds.append([task.client for task in tasks])
        return Counter(client for tasks in self._rounds[:round_] for client in tasks)


def noise_multiplier(config: CellConfig, client_indices: Sequence[Indices], method: Method) -> float:
    """The noise of a cell in units of the clip: `privacy.noise`, or what `privacy.target_epsilon` needs.

    Args:
        config: of the cell.
        client_indices: the images of each client.
        method: resolved over the slices.

    Returns:
        0 without privacy, and for an infinite target.
    """
    privacy = config.privacy
    if privacy is None:
        return 0.0
    if privacy.target_epsilon is None or not config.rounds:
        return privacy.noise
    plans = {(config.fraction, config.rounds)}
    if privacy.name == EXAMPLE:
        schedule = SamplingSchedule(config, [len(indices) for indices in client_indices], method)
        updates = schedule.count_updates(config.rounds)
        plans = {(rate, steps * updates[k]) for k, (rate, steps) in enumerate(schedule.sampling)}

    def worst(noise: float) -> tuple[float, float, int]:
        return max((Account(noise, rate, privacy.delta).epsilon(steps), rate, steps) for rate, steps in plans)

    noise, (epsilon, rate, releases) = 1.0, worst(1.0)
    while releases and (noise == 1.0 or epsilon > privacy.target_epsilon):
        noise = calibrate(privacy.target_epsilon, privacy.delta, rate, releases)
        epsilon, rate, releases = worst(noise)
    return noise


def _as_json(number: float) -> float | str:
    """The number, or `inf`, which JSON has no number for."""
    return "inf" if number == float("inf") else number
