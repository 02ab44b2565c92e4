"""Client-level privacy (DP-FedAvg, arXiv 1710.06963): clips updates and adds noise to their sum."""

import math
from dataclasses import dataclass

import torch

from fedlight.federation.aggregate import WeightedMean
from fedlight.federation.messages import State
from fedlight.federation.noise import Normal, Source
from fedlight.runtime.errors import Damaged

LARGEST_NORM = torch.finfo(torch.float32).max  # of an update that is clipped
RATE = 0.2  # eta_C, the learning rate of the adaptive clip
COUNT_NOISE = 1 / 20  # sigma_b over the cohort: noise on the number of updates within the clip


@dataclass(frozen=True)
class GaussianMechanism:
    """Bounds what one client adds to the sum of a round, and adds Gaussian noise to that sum.

    The norm of an update is that of the changes in the reported slices together with the auxiliary state. The
    sum is divided by the expected size of the cohort, not by its actual size. So adding or removing one
    client changes the sum by `clip` at most, which the noise of standard deviation `noise * clip` hides.

    Attributes:
        clip: the largest L2 norm of an update, above 0; infinite for no clipping.
        noise: standard deviation of the noise on the sum, in clips, 0 or more.
        clients: K, of the federation.
        expected: clients in a cohort, on average.
        at_clients: each client clips by itself and adds a K-th of the noise's variance before it reports; the
            server adds the rest, so that the sum has the same noise for any number of reports. Otherwise the
            server does both.
        quantile: the share of updates that the clip leaves unchanged; the clip adapts to it from round to
            round (arXiv 1905.03871). None for a constant clip.
        source: of the noise.
        summed: secure aggregation adds updates up. A client clips alone; the noise is added to its integers,
            and that of the clients in a sum is all the noise that the sum needs.
    """

    clip: float
    noise: float
    clients: int
    expected: float
    at_clients: bool
    quantile: float | None
    source: Source
    summed: bool = False

    def init(self) -> State:
        """The server's state, which it keeps from round to round."""
        return {} if self.quantile is None else {"clip": torch.tensor(self.clip, dtype=torch.float64)}

    def share(
        self, values: State, aux: State, received: State, round_: int, client: int
    ) -> tuple[State, State]:
        """Clips an update at its client and adds the client's share of the noise, before it is reported.

        Args:
            values: the trained tensors that are reported.
            aux: the auxiliary state that is reported.
            received: the values as they were received.
            round_, client: name the noise.
        """
        bounded, scaled, _ = self.clip_update(values, aux, received, {})
        if self.summed:
            return bounded, scaled
        deviation = self.noise * self.clip / math.sqrt(self.clients) if self.noise else 0.0
        normal = self.source("client", round_, client)
        return _add_noise(bounded, values, deviation, normal), _add_noise(scaled, aux, deviation, normal)

    def clip_update(self, values: State, aux: State, start: State, state: State) -> tuple[State, State, bool]:
        """Clips an update to its largest norm.

        Args:
            values: trained tensors.
            aux: the auxiliary state.
            start: the values from which the change is measured.
            state: of the server; if empty, the clip is the first one.

        Returns:
            The update, in float64 where it was clipped, and whether it was within the clip.

        Raises:
            Damaged: the norm of the update is not finite.
        """
        ends = {name: tensor.double() for name, tensor in values.items()}
        starts = {name: start[name].double() for name in values}
        clip, norm = self._clip(state), update_norm(ends, starts, aux)
        check_norm(norm)
        if norm <= clip:
            return values, aux, True
        scale = clip / norm
        lerped = torch._foreach_lerp(list(starts.values()), list(ends.values()), scale) if values else ()
        clipped = dict(zip(values, lerped, strict=True))
        return clipped, {name: scale * tensor.double() for name, tensor in aux.items()}, False

    def finish(
        self,
        round_: int,
        mean: WeightedMean,
        aux: WeightedMean,
        theta: State,
        like: State,
        within_clip: list[bool],
        state: State,
    ) -> State:
        """Prepares the sums of a round for release: sets their denominator and adds the noise.

        Args:
            round_: names the noise.
            mean, aux: of the updates so far, each with weight 1.
            theta: the slices of the global model that are reported, before the round.
            like: tensors like the auxiliary state that is reported.
            within_clip: for each update, whether it was within the clip.
            state: of the server.

        Returns:
            The new state of the server.
        """
        if absent := self.expected - len(within_clip):
            mean.add(theta, absent)
            aux.add({name: torch.zeros_like(tensor) for name, tensor in like.items()}, absent)
        noise, count_noise = self.noise, 0.0
        if self.quantile is not None and noise:  # two releases together cost as much as one with `noise`
            count_noise = COUNT_NOISE * self.expected
            noise = (noise**-2 - (2 * count_noise) ** -2) ** -0.5
        missing = 1 - len(within_clip) / self.clients if self.at_clients else 1.0
        normal = self.source("server", round_)
        if noise and missing and not self.summed:
            deviation = noise * self._clip(state) * math.sqrt(missing)
            mean.shift(_draw(theta, deviation, normal))
            aux.shift(_draw(like, deviation, normal))
        if self.quantile is None:
            return state
        inside = sum(within_clip) - len(within_clip) / 2 + count_noise * float(normal.standard_normal(()))
        share = 0.5 + inside / self.expected
        return {"clip": state["clip"] * math.exp(-RATE * (share - self.quantile))}

    def _clip(self, state: State) -> float:
        return float(state.get("clip", self.clip))


def check_norm(norm: float) -> None:
    """Raises Damaged for the norm of an update that is not finite, or too large to be added to others."""
    if not norm <= LARGEST_NORM:
        raise Damaged("is not finite")


def update_norm(values: State, start: State, aux: State) -> float:
    """The L2 norm of an update, its auxiliary state included, computed in float64."""
    changes = [tensor.double() for tensor in aux.values()]
    if values:
        ends = [tensor.double() for tensor in values.values()]
        changes = [*torch._foreach_sub(ends, [start[name].double() for name in values]), *changes]
    if not changes:
        return 0.0
    squares = [square.sum() for square in torch._foreach_mul(changes, changes)]
    return math.sqrt(sum(torch.stack(squares).tolist()))


def _draw(like: State, deviation: float, normal: Normal) -> State:
    return {name: deviation * torch.from_numpy(normal.standard_normal(t.shape)) for name, t in like.items()}


def _add_noise(tensors: State, like: State, deviation: float, normal: Normal) -> State:
    """The tensors with noise, in the dtypes of `like`."""
    noise = _draw(tensors, deviation, normal)
    return {name: (tensor + noise[name]).to(like[name].dtype) for name, tensor in tensors.items()}
