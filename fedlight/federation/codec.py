"""How slices become payloads and back: as values, or as deltas encoded by a chain of transforms."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedlight.federation.messages import Payload, State


class Transform(Protocol):
    """One stage of a chain; it sees the floating-point tensors of one slice of one client."""

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        """The tensors to send in place of `delta`; draws come from `rng` alone."""

    def decode(self, sent: State, like: State) -> State:
        """The delta that `sent` stands for; the tensors of `like` have its names, shapes and dtypes."""

    def sent_like(self, like: State) -> State:
        """Tensors of the names, shapes and dtypes that `encode` gives for such a delta."""


class Codec:
    """Encodes what a client reports and decodes it at the server.

    Without transforms the values themselves cross. With them the difference to the values that the client
    received crosses, encoded stage by stage; what the encoding lost stays with the client and is added to its
    next delta (error feedback, arXiv 1901.09847). Integer tensors always cross as they are.

    Args:
        up: the stages of the uplink, first to last.
    """

    def __init__(self, up: Sequence[Transform] = ()) -> None:
        self.up = tuple(up)

    def encode(
        self, values: State, received: State, errors: State, rng: np.random.Generator
    ) -> tuple[Payload, State]:
        """Encodes a slice at the client.

        Args:
            values: the trained tensors.
            received: the same tensors as they were received in this round.
            errors: what earlier encodings of this slice lost, by name; absent names lost nothing.
            rng: the only source of randomness.

        Returns:
            The payload, and the new errors.
        """
        params = Payload.plain(values).params
        if not self.up:
            return Payload(values, params), {}
        counters = {name: value for name, value in values.items() if not value.is_floating_point()}
        delta = {name: values[name] - received[name] for name in values if name not in counters}
        delta |= {name: delta[name] + error for name, error in errors.items()}
        sent = delta
        for stage in self.up:
            sent = stage.encode(sent, rng)
        arriving = self._decode(sent, delta)
        lost = {name: delta[name] - arriving[name] for name in delta}
        return Payload({**sent, **counters}, params), lost

    def decode(self, payload: Payload, held: State) -> State:
        """The trained values of a slice at the server.

        Args:
            payload: as it arrived.
            held: the same tensors as the server sent them in this round.
        """
        if not self.up:
            return payload.tensors
        floating = {name: tensor for name, tensor in held.items() if tensor.is_floating_point()}
        counters = {name: payload.tensors[name] for name in held if name not in floating}
        sent = {name: tensor for name, tensor in payload.tensors.items() if name not in counters}
        delta = self._decode(sent, floating)
        return {name: counters[name] if name in counters else held[name] + delta[name] for name in held}

    def _decode(self, sent: State, like: State) -> State:
        shapes = [like]
        for stage in self.up[:-1]:
            shapes.append(stage.sent_like(shapes[-1]))
        for stage, shape in zip(reversed(self.up), reversed(shapes), strict=True):
            sent = stage.decode(sent, shape)
        return sent
