"""Client-level privacy (DP-FedAvg, arXiv 1710.06963): updates are clipped, and noise hides each of them."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from fedlight.federation.aggregate import WeightedMean
from fedlight.federation.messages import State
from fedlight.federation.noise import Normal, Source
from fedlight.runtime.errors import Damaged

RATE = 0.2  # eta_C, the learning rate of the adaptive clip
COUNT_NOISE = 1 / 20  # sigma_b over the cohort: noise on the number of updates within the clip
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class GaussianMechanism:
    """Bounds what one client adds to the sum of a round, and adds Gaussian noise to that sum.

    All that leaves a client counts in one norm: what changed in the reported slices, and the algorithm's
    extras. The sum is divided by the expected size of the cohort, whatever its size is. So one client more or
    less changes the sum by `clip` at most, which the noise of standard deviation `noise * clip` hides.

    Attributes:
        clip: the largest L2 norm of an update, above 0; infinite for no clipping.
        noise: standard deviation of the noise on the sum, in clips, 0 or more.
        clients: K, of the federation.
        expected: clients in a cohort, on average.
        at_clients: each client clips by itself and adds a K-th of the noise's variance before it reports; the
            server adds what is missing, so that the sum's noise is the same whoever takes part. Otherwise the
            server does both.
        quantile: the share of updates that the clip is to leave as they are; it moves there from round to
            round (arXiv 1905.03871). None for a clip that stays.
        source: of the noise.
    """

    clip: float
    noise: float
    clients: int
    expected: float
    at_clients: bool
    quantile: float | None
    source: Source

    def init(self) -> State:
        """What the server keeps from round to round."""
        return {} if self.quantile is None else {"clip": torch.tensor(self.clip, dtype=torch.float64)}

    def share(
        self, values: State, aux: State, received: State, round_: int, client: int
    ) -> tuple[State, State]:
        """What a client reports where noise is added at the clients: clipped, with its share of the noise.

        Args:
            values: the trained tensors that are to leave.
            aux: of the algorithm, which leave as well.
            received: the values as they were received.
            round_, client: name the noise.
        """
        bounded, scaled, _ = self.bound(values, aux, received, {})
        deviation = self.noise * self.clip / math.sqrt(self.clients) if self.noise else 0.0
        normal = self.source("client", round_, client)
        return _blurred(bounded, values, deviation, normal), _blurred(scaled, aux, deviation, normal)

    def admit(
        self, values: State, aux: State, theta: State, like: State, state: State
    ) -> tuple[State, State, bool]:
        """Makes an update, which may be anything from anyone, a term of the sum.

        Args:
            values, extras: the update.
            theta: the global model, as far as it is to be reported.
            like: tensors like the extras that are to be reported.
            state: the server's own.

        Returns:
            What `bound` does; where the clients clip and add noise, the update as it came.

        Raises:
            Damaged: it cannot be part of the sum.
        """
        for found, wanted in ((values, theta), (aux, like)):
            if _shapes(found) != _shapes(wanted):
                raise Damaged("does not hold the tensors that are to be reported")
        if not _norm(values, theta, aux) <= LARGEST:
            raise Damaged("is not finite")
        return (values, aux, True) if self.at_clients else self.bound(values, aux, theta, state)

    def bound(self, values: State, aux: State, start: State, state: State) -> tuple[State, State, bool]:
        """Clips an update to its largest norm.

        Args:
            values: trained tensors.
            aux: of the algorithm.
            start: what the change of the values is measured from.
            state: the server's own; without it the clip is the first one.

        Returns:
            The update, in float64 where it was clipped, and whether it fitted as it was.
        """
        clip, norm = self._clip(state), _norm(values, start, aux)
        if norm <= clip:
            return values, aux, True
        scale = clip / norm
        clipped = {name: torch.lerp(start[name].double(), t.double(), scale) for name, t in values.items()}
        return clipped, {name: scale * tensor.double() for name, tensor in aux.items()}, False

    def finish(
        self,
        round_: int,
        mean: WeightedMean,
        aux: WeightedMean,
        theta: State,
        like: State,
        fitting: list[bool],
        state: State,
    ) -> State:
        """Makes the sums of a round ready for release: the fixed denominator, and the noise.

        Args:
            round_: names the noise.
            mean, extras: of the updates so far, each with weight 1.
            theta: the global model before the round, as far as it is reported.
            like: tensors like the extras that are reported.
            fitting: for each update, whether it was within the clip.
            state: the server's own.

        Returns:
            The new state.
        """
        if absent := self.expected - len(fitting):
            mean.add(theta, absent)
            aux.add({name: torch.zeros_like(tensor) for name, tensor in like.items()}, absent)
        noise, count_noise = self.noise, 0.0
        if self.quantile is not None and noise:  # two releases, which together cost what one of `noise` does
            count_noise = COUNT_NOISE * self.expected
            noise = (noise**-2 - (2 * count_noise) ** -2) ** -0.5
        missing = 1 - len(fitting) / self.clients if self.at_clients else 1.0
        normal = self.source("server", round_)
        if noise and missing:
            deviation = noise * self._clip(state) * math.sqrt(missing)
            mean.shift(_draw(theta, deviation, normal))
            aux.shift(_draw(like, deviation, normal))
        if self.quantile is None:
            return state
        inside = sum(fitting) - len(fitting) / 2 + count_noise * float(normal.standard_normal(()))
        share = 0.5 + inside / self.expected
        return {"clip": state["clip"] * math.exp(-RATE * (share - self.quantile))}

    def _clip(self, state: State) -> float:
        return float(state.get("clip", self.clip))


def _norm(values: State, start: State, aux: State) -> float:
    """The L2 norm of an update, all of it, in float64."""
    squares = [(t.double() - start[name].double()).square().sum() for name, t in values.items()]
    squares += [tensor.double().square().sum() for tensor in aux.values()]
    return math.sqrt(sum(squares)) if squares else 0.0


def _shapes(tensors: State) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _draw(like: State, deviation: float, normal: Normal) -> State:
    return {name: deviation * torch.from_numpy(normal.standard_normal(t.shape)) for name, t in like.items()}


def _blurred(tensors: State, like: State, deviation: float, normal: Normal) -> State:
    """With noise, in the dtypes of `like`."""
    noise = _draw(tensors, deviation, normal)
    return {name: (tensor + noise[name]).to(like[name].dtype) for name, tensor in tensors.items()}
