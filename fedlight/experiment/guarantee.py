"""What a cell promises about privacy: checked beforehand, and accounted after every round."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lightning import Callback

from fedlight.config import CellConfig
from fedlight.data.client_data import poisson_rate
from fedlight.data.partition import Indices
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.cohort import Participation
from fedlight.federation.mechanism import COUNT_NOISE, GaussianMechanism
from fedlight.federation.messages import State
from fedlight.federation.method import Method
from fedlight.federation.noise import SecretNoise, SeededNoise, note
from fedlight.federation.slices import SliceMap
from fedlight.privacy.account import Account, calibrate
from fedlight.privacy.example_level import PrivateGradients
from fedlight.runtime.errors import BadInput

CLIENT, EXAMPLE = "client", "example"
RELEASES = "releases"  # in the checkpoint's folder: a byte for each release with secret noise


class Guarantee:
    """The account of a cell: what its noise and its sampling cost so far.

    A release is a round under client-level privacy, and a step of a client's optimizer under example-level
    privacy, where each client has an account of its own.

    Args:
        config: of the cell, with its noise.
        shares: the images of each client.
        method: resolved over the slices.
        checkpoint: the folder of the checkpoint.
    """

    def __init__(
        self, config: CellConfig, shares: Sequence[Indices], method: Method, checkpoint: Path
    ) -> None:
        assert config.privacy is not None
        self._config = config
        self._asked = config.privacy
        self._checkpoint = checkpoint
        self._plan = Plan(config, [len(share) for share in shares], method)
        self._account = cache(lambda rate: Account(self._asked.noise, rate, self._asked.delta))

    def epsilons(self, round_: int) -> list[float]:
        """What was spent up to a round, by each client under example-level privacy, else one number.

        Rounds that were done again with fresh noise count again.
        """
        if self._asked.name == CLIENT:
            releases = max(round_, self._noted(RELEASES))
            return [self._account(self._config.fraction).epsilon(releases)]
        spent = cache(lambda rate, steps: self._account(rate).epsilon(steps))
        took_part = self._plan.took_part(round_)
        return [
            spent(rate, steps * max(took_part[client], self._noted(f"{RELEASES}-{client:06d}")))
            for client, (rate, steps) in enumerate(self._plan.sampling)
        ]

    def entry(self, epsilons: list[float]) -> dict[str, Any]:
        """The `privacy` entry of `result.json`; an infinite epsilon is the word `inf`."""
        asked = self._asked
        entry = {
            "kind": asked.name,
            "epsilon": as_json(max(epsilons)),
            "delta": asked.delta,
            "noise": asked.noise,
            "clip": as_json(asked.clip),
        }
        if asked.name == CLIENT:
            return entry | {"noise_at": asked.noise_at}
        return entry | {"draws": asked.draws, "epsilon_clients": [as_json(epsilon) for epsilon in epsilons]}

    def _noted(self, name: str) -> int:
        path = self._checkpoint / name
        return path.stat().st_size if path.exists() else 0


class Plan:
    """Who takes part in which round under example-level privacy, and how its batches are sampled.

    Attributes:
        sampling: for each client, the probability that an image is in a batch, and the steps of a round.
    """

    def __init__(self, config: CellConfig, sizes: list[int], method: Method) -> None:
        self._participation = make_participation(config)
        self._method = method
        self._rounds: list[list[int]] = []
        sizes = [sum(sizes)] if method.pool else sizes
        batch = config.data.batch_size
        self.sampling = [(poisson_rate(n, batch), config.epochs * -(-n // batch)) for n in sizes]

    def took_part(self, round_: int) -> Counter[int]:
        """How often each client took part up to a round; one that dropped out is counted as well."""
        while len(self._rounds) < round_:
            _, tasks = self._participation.draw(self._method, len(self._rounds) + 1)
            self._rounds.append([task.client for task in tasks])
        return Counter(client for tasks in self._rounds[:round_] for client in tasks)


def as_json(number: float) -> float | str:
    """The number, or `inf`, which JSON has no number for."""
    return "inf" if number == float("inf") else number


def make_participation(config: CellConfig) -> Participation:
    """Who takes part in the rounds of a cell."""
    asked = config.privacy
    return Participation(
        config.clients,
        config.fraction,
        config.federation.dropout,
        config.seed,
        poisson=asked is not None and asked.name == CLIENT,
        secret=asked is not None and asked.secure_noise,
    )


def calibrated(config: CellConfig, shares: Sequence[Indices], method: Method) -> CellConfig:
    """The settings with the noise that `privacy.target_epsilon` asks for (none if infinite), in its place."""
    asked = config.privacy
    if asked is None or asked.target_epsilon is None or not config.rounds:
        return config
    plans = {(config.fraction, config.rounds)}
    if asked.name == EXAMPLE:
        plan = Plan(config, [len(share) for share in shares], method)
        took_part = plan.took_part(config.rounds)
        plans = {(rate, steps * took_part[k]) for k, (rate, steps) in enumerate(plan.sampling)}

    def worst(noise: float) -> tuple[float, float, int]:
        return max((Account(noise, rate, asked.delta).epsilon(steps), rate, steps) for rate, steps in plans)

    noise, (epsilon, rate, releases) = 1.0, worst(1.0)
    while releases and (noise == 1.0 or epsilon > asked.target_epsilon):
        noise = calibrate(asked.target_epsilon, asked.delta, rate, releases)
        epsilon, rate, releases = worst(noise)
    found = asked.model_copy(update={"noise": noise, "target_epsilon": None})
    return config.model_copy(update={"privacy": found})


def make_mechanism(config: CellConfig, checkpoint: Path | None = None) -> GaussianMechanism | None:
    """How updates are clipped and noised under client-level privacy.

    Args:
        config: of the cell, with its noise.
        checkpoint: the folder where the server notes its releases.
    """
    asked = config.privacy
    if asked is None or asked.name != CLIENT:
        return None
    secret = SecretNoise(checkpoint / RELEASES if checkpoint else None)
    return GaussianMechanism(
        asked.clip,
        asked.noise,
        config.clients,
        config.fraction * config.clients,
        asked.noise_at == "clients",
        asked.clip_quantile,
        secret if asked.secure_noise else SeededNoise(config.seed),
    )


def make_private_training(
    config: CellConfig, shares: Sequence[Indices], checkpoint: Path
) -> Callable[[int], Callback] | None:
    """What makes a client's gradients private under example-level privacy.

    Args:
        config: of the cell, with its noise.
        shares: the images of each client that trains.
        checkpoint: the folder where a client notes its releases.
    """
    asked = config.privacy
    if asked is None or asked.name != EXAMPLE:
        return None

    def make(client: int) -> Callback:
        images, batch = len(shares[client]), config.data.batch_size
        if asked.secure_noise:
            note(checkpoint / f"{RELEASES}-{client:06d}")
        return PrivateGradients(
            asked.noise,
            asked.clip,
            poisson_rate(images, batch) * images,
            asked.draws or 1,
            asked.secure_noise,
        )

    return make


def check_privacy(
    config: CellConfig, method: Method, algorithm: FedAvg, slices: SliceMap, first: State
) -> None:
    """Rejects configurations that void the privacy guarantee.

    Args:
        config: of the cell.
        method: resolved over the slices.
        algorithm: of the cell.
        slices: the slice map of the model.
        first: the first state_dict.

    Raises:
        BadInput: the privacy does not go with something else that was asked for.
    """
    asked = config.privacy
    if asked is None:
        return
    reasons: dict[str, Any] = {
        "a finite privacy.clip, or privacy.noise=0": asked.noise and asked.clip == float("inf")
    }
    if asked.name == EXAMPLE:
        reasons["trainer.compile=false"] = config.trainer.compile
        members = [name for names in slices.names.values() for name in names if name in slices.buffers]
        running = [name for name in members if first[name].is_floating_point()]
        reasons[f"parameters alone: {', '.join(running)} is a buffer, made of images without noise"] = running
    else:
        unsent = [slice_ for slice_ in method.uplink if slice_ not in method.downlink]
        theta = slices.select(method.uplink, first)
        whole = [name for name, tensor in theta.items() if not tensor.is_floating_point()]
        buffers = [name for name in theta if name in slices.buffers]
        silent = type(algorithm).report is not FedAvg.report and not algorithm.aux_like(theta)
        at_clients, adaptive = asked.noise_at == "clients", asked.clip_quantile is not None
        most = 2 * COUNT_NOISE * config.fraction * config.clients  # noise that leaves the count its share
        reasons |= {
            "a method whose clients report: CENTRAL and LOCAL have none": method.pool or not method.uplink,
            "a method whose clients all report the same: a deal of slices shows who takes part": method.split,
            "a method that exchanges the same in every round: warm_start changes it": method.warm_start,
            f"a method that sends down what clients report: {', '.join(unsent)} is not": unsent,
            f"floating tensors: {', '.join(whole)} holds whole numbers, which noise cannot hide": whole,
            f"parameters alone: {', '.join(buffers)} is a buffer, which noise would spoil": buffers,
            "an algorithm that tells beforehand what clients report beside the slices": silent,
            "privacy.noise_at=server where a transform encodes updates": at_clients and config.transform,
            "privacy.noise_at=server for an adaptive clip": at_clients and adaptive,
            f"noise below {most:.3g} for an adaptive clip in cohorts so small": adaptive
            and asked.noise >= most,
        }
    for needed, broken in reasons.items():
        if broken:
            raise BadInput(f"privacy={asked.name} needs {needed}")
