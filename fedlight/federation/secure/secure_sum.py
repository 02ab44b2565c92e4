"""Updates as vectors of integers: how a client encodes them, and how the server decodes their sum.

A slice is one vector modulo 2^m: the client's weight, its loss times its weight, and for each scalar the
change since the broadcast in fixed point times the weight. The auxiliary state of an algorithm that belongs
to the slice follows. With a share below 1 the vector has a part of the scalars, drawn from the seed and the
same for all clients of the round (a random mask, arXiv 1610.05492). A transport between institutions masks
these vectors; in a simulation, where all processes trust each other, they are sent as they are, and the bytes
of keys and shares are counted.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import Payload, State, Update
from fedlight.federation.noise import Source
from fedlight.federation.secure.discrete_gaussian import draw_discrete_gaussian
from fedlight.federation.secure.fixed_point import FixedPoint, check_weight
from fedlight.federation.secure.integers import pack_integers, to_signed, unpack_integers
from fedlight.federation.secure.mask_bytes import KEYS_BYTES, mask_traffic
from fedlight.federation.secure.signatures import check_signature, signed_content
from fedlight.federation.secure.sum_sizes import count_reporters, fewest_that_unmask, smallest_sums
from fedlight.federation.slices import SliceMap
from fedlight.runtime.errors import BadInput, Damaged
from fedlight.runtime.seeds import stream

INTEGERS = "integers"  # name of the tensor of a payload
STATISTICS = 2  # integers before those of the tensors: weight, and loss times weight


@dataclass(frozen=True)
class DiscreteNoise:
    """Noise that each client adds to its integers under client-level privacy.

    The sum of the discrete Gaussian noise of n clients is as good as that of n times the variance (arXiv
    2102.06387, theorem 1: for a deviation of 10 or more the difference is below e^-900).

    Attributes:
        deviation: standard deviation of a client's noise in whole numbers.
        source: of the noise.
    """

    deviation: float
    source: Source


@dataclass(frozen=True)
class SecureAggregation:
    """The encoding of updates, and the rules of which sums the server may learn.

    Attributes:
        fixed: fixed-point numbers.
        threshold: `aggregation.threshold`.
        slices: the slice map of the model.
        algorithm: declares weights and auxiliary state.
        seed: of the federation; rounding at random draws from the stream (seed, round, client, slice).
        noise: under client-level privacy; None for none.
        sums_loss: whether the sum of the clients' losses may be known, which privacy forbids.
        share: of the scalars of a slice that are sent in a round, above 0; the others stay as they are.
        signers: fingerprints of the keys of clients' nodes, in client order, with which clients sign the
            public keys of a round; None where the agreement lists none, so that nothing is signed.
    """

    fixed: FixedPoint
    threshold: int | None
    slices: SliceMap
    algorithm: FedAvg
    seed: int
    noise: DiscreteNoise | None = None
    sums_loss: bool = True
    share: float = 1.0
    signers: tuple[str, ...] | None = None

    # --- at a client ---

    def encode(
        self,
        uplink: tuple[str, ...],
        values: State,
        received: State,
        aux: State,
        weight: float,
        loss: float | None,
        round_: int,
        client: int,
    ) -> dict[str, Payload]:
        """The payloads of an update.

        Args:
            uplink: the slices to report.
            values: the trained tensors of these slices.
            received: the same tensors as they were received.
            aux: the auxiliary state; a declared tensor that is absent counts as 0.
            weight: of the client in the mean.
            loss: mean training loss of an image; None where privacy hides it.
            round_, client: name the random draws.

        Raises:
            BadInput: the weight is no whole number, or the sum of a cohort might exceed the modulus.
        """
        whole, payloads = check_whole(weight), {}
        for slice_ in uplink:
            rng = stream(self.seed, "secure", round_, client, slice_)
            like, aux_like = self.tensors_like(slice_, received)
            parts = [values[name].double() - received[name].double() for name in like]
            parts += [aux.get(name, torch.zeros_like(tensor)).double() for name, tensor in aux_like.items()]
            real = torch.cat([part.flatten() for part in parts]).numpy()
            if self.share < 1:
                real = real[self._sent_places(slice_, round_, len(real))]
            rounded = whole * self.fixed.round(real, rng)
            if self.noise:
                uniform = self.noise.source("client", round_, client, slice_)
                rounded += draw_discrete_gaussian(self.noise.deviation, len(rounded), uniform)
            weighted_loss = 0 if loss is None else whole * self.fixed.round_loss(loss, rng)
            vector = np.concatenate([np.array([whole, weighted_loss], np.int64), rounded])
            packed = pack_integers(vector.view(np.uint64), self.fixed.modulus_bits)
            payloads[slice_] = Payload({INTEGERS: packed}, len(real))
        return payloads

    # --- at the server ---

    def check_payload(self, slice_: str, payload: Payload, theta: State) -> NDArray[np.uint64]:
        """Validates the payload of a slice and returns its integers modulo 2^m, masked or not.

        Raises:
            Damaged: it is not one vector of the expected length.
        """
        params = self.count_params(slice_, theta)
        if payload.tensors.keys() != {INTEGERS}:
            raise Damaged(f"does not have one vector of integers in slice {slice_}")
        if payload.params != params:
            raise Damaged(f"states {payload.params} parameters in slice {slice_}, which has {params}")
        return unpack_integers(payload.tensors[INTEGERS], self.fixed.modulus_bits, STATISTICS + params)

    def check_update(self, update: Update, uplink: Collection[str], theta: State) -> None:
        """Checks the content of one untrusted update, whose integers are masked.

        Raises:
            Damaged: it has other slices than it was to report, invalid vectors, or numbers that only their
                sums may have.
        """
        if update.payloads.keys() != {*uplink}:
            reported, expected = (", ".join(sorted(names)) for names in (update.payloads, uplink))
            raise Damaged(f"reports {reported or 'nothing'} instead of {expected}")
        for slice_, payload in update.payloads.items():
            self.check_payload(slice_, payload, theta)
        if update.num_examples or update.loss is not None:
            raise Damaged("states its number of images or its loss, which secure aggregation hides")

    def tensors_like(self, slice_: str, theta: State) -> tuple[State, State]:
        """The tensors of a slice, and tensors like the auxiliary state that belongs to it."""
        values = self.slices.select([slice_], theta)
        aux_like = self.algorithm.aux_like(self.slices.parameters(values))
        return values, self.slices.auxiliary([slice_], aux_like)

    def add_changes(
        self, slice_: str, theta: State, changes: NDArray[np.float64], round_: int
    ) -> tuple[State, State]:
        """The values of a slice after changes of its scalars, and the auxiliary state that follows them.

        Args:
            slice_: of the model.
            theta: the values before.
            changes: of the scalars that are sent in the round.
            round_: 1..R.
        """
        values, aux = self.tensors_like(slice_, theta)
        if self.share < 1:
            everywhere = np.zeros(self._count_scalars(slice_, theta))
            everywhere[self._sent_places(slice_, round_, len(everywhere))] = changes
            changes = everywhere
        parts = _split(torch.from_numpy(changes), [*values.values(), *aux.values()])
        after = {name: tensor.double() + parts.pop(0) for name, tensor in values.items()}
        return after, dict(zip(aux, parts, strict=True))

    def count_params(self, slice_: str, theta: State) -> int:
        """The number of scalars that are sent of a slice and of its auxiliary state."""
        return self._count_sent(self._count_scalars(slice_, theta))

    def _count_scalars(self, slice_: str, theta: State) -> int:
        return sum(tensor.numel() for like in self.tensors_like(slice_, theta) for tensor in like.values())

    def _count_sent(self, scalars: int) -> int:
        return math.ceil(self.share * scalars)

    def _sent_places(self, slice_: str, round_: int, scalars: int) -> NDArray[np.int64]:
        """Which scalars of a slice are sent in a round, ascending."""
        rng = stream(self.seed, "sent", round_, slice_)
        return np.sort(rng.choice(scalars, self._count_sent(scalars), replace=False, shuffle=False))

    def payload_like(self, slice_: str, theta: State) -> Payload:
        """A payload of the size of those of a slice."""
        params = self.count_params(slice_, theta)
        size = (STATISTICS + params) * self.fixed.modulus_bits // 8
        return Payload({INTEGERS: torch.zeros(size, dtype=torch.uint8)}, params)

    def smallest_sums(self, uplinks: Mapping[int, tuple[str, ...]]) -> dict[str, int]:
        """Slice: the fewest clients in its sum, of those that are to report it in a round."""
        return smallest_sums(uplinks, self.threshold)

    def summed_slices(self, planned: Mapping[int, tuple[str, ...]], reporters: Collection[int]) -> set[str]:
        """The slices that enough clients report for their sum to be known.

        Args:
            planned: the slices that each client of the cohort is to report.
            reporters: the clients of it that do.
        """
        counts = count_reporters({client: planned[client] for client in reporters})
        return {slice_ for slice_, few in self.smallest_sums(planned).items() if counts[slice_] >= few}

    def mask_traffic(
        self, planned: Mapping[int, tuple[str, ...]], reporters: Collection[int]
    ) -> dict[int, tuple[int, int]]:
        """Client: bytes of keys and shares to it and from it, where those that report do not fail.

        Args:
            planned: the slices that each client of the cohort is to report.
            reporters: the clients that trained.
        """
        enough = self.can_unmask(len(planned), len(reporters))
        summed = self.summed_slices(planned, reporters) if enough else None
        return mask_traffic(planned, reporters, summed, self.signers is not None)

    def check_keys(self, cell: str, round_: int, client: int, content: bytes) -> None:
        """Checks that the node of a client has signed its public keys, where the agreement lists nodes' keys.

        Raises:
            Damaged: it has not signed them for this round.
        """
        if self.signers:
            keys, signature = content[:KEYS_BYTES], content[KEYS_BYTES:]
            check_signature(signature, signed_content(cell, round_, client, keys), self.signers[client])

    def can_unmask(self, planned: int, reporters: int) -> bool:
        """Whether so many reporters of a cohort can unmask a sum."""
        return reporters >= fewest_that_unmask(self.threshold, planned)


@dataclass(frozen=True)
class MeanUpdate:
    """The decoded sum of a slice.

    Attributes:
        values: mean of the clients' values, float64.
        aux: mean of their auxiliary state, float64.
        weight: sum of the clients' weights.
        loss: sum of their losses times their weights.
        clients: number of clients in the sum.
    """

    values: State
    aux: State
    weight: int
    loss: float
    clients: int


class SliceSums:
    """The sums of a round, modulo 2^m, by slice; the order of additions has no effect.

    Args:
        secure: encodes updates.
        theta: the reported slices, as clients received them.

    Attributes:
        reporters: slice: the clients in its sum.
    """

    def __init__(self, secure: SecureAggregation, theta: State) -> None:
        self._secure = secure
        self._theta = theta
        self._sums: dict[str, NDArray[np.uint64]] = {}
        self._round = 0
        self.reporters: dict[str, set[int]] = {}

    def add(self, update: Update) -> None:
        """Adds the vectors of an update, masked or not; all are of one round.

        Raises:
            Damaged: they are invalid; nothing is added then.
        """
        vectors = {
            slice_: self._secure.check_payload(slice_, payload, self._theta)
            for slice_, payload in update.payloads.items()
        }
        self._round = update.round
        for slice_, vector in vectors.items():
            self._sums[slice_] = self._sums[slice_] + vector if slice_ in self._sums else vector
            self.reporters.setdefault(slice_, set()).add(update.client)

    def unmask(self, masks: Mapping[str, NDArray[np.uint64]]) -> None:
        """Subtracts the sum of the masks of each slice; a slice without one is lost."""
        for slice_ in [*self._sums]:
            if slice_ in masks:
                self._sums[slice_] = self._sums[slice_] - masks[slice_]
            else:
                del self._sums[slice_], self.reporters[slice_]

    def decode(self, slice_: str) -> MeanUpdate:
        """The mean of a slice.

        Raises:
            Damaged: the sum cannot be that of its clients.
        """
        fixed, clients = self._secure.fixed, len(self.reporters[slice_])
        total = to_signed(self._sums[slice_], fixed.modulus_bits)
        weight, loss = int(total[0]), int(total[1])
        check_weight(weight, clients)
        largest = int(np.abs(total[STATISTICS:]).max(initial=0))
        if self._secure.noise is None and largest > weight * fixed.levels:
            raise Damaged(f"the sum exceeds that of {clients} clients whose changes are within the clip")
        changes = fixed.mean(total[STATISTICS:], weight)
        values, aux = self._secure.add_changes(slice_, self._theta, changes, self._round)
        return MeanUpdate(values, aux, weight, weight * fixed.mean_loss(loss, weight), clients)


def check_whole(weight: float) -> int:
    """The weight of a client as a whole number.

    Raises:
        BadInput: it is none, or below 1.
    """
    if weight < 1 or weight != math.floor(weight):
        raise BadInput(
            f"aggregation=secure sums whole numbers: algorithm.weight must be one of at least 1, got {weight}"
        )
    return int(weight)


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of a vector, in the shapes of the tensors."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
