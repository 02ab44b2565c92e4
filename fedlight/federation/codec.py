"""How slices become payloads and back: as values, or as deltas encoded by a chain of transforms."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlight.federation.messages import Payload, State
from fedlight.federation.packing import join, split
from fedlight.runtime.errors import BadInput, Damaged, Diverged

DELTA = "delta/"  # begins the name of an encoded delta in a payload; what follows names its round


class Transform(Protocol):
    """One stage of a chain; it sees the floating-point tensors of one slice. Whole numbers pass it by."""

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        """The tensors to send in place of `delta`; draws come from `rng` alone."""

    def decode(self, sent: State, like: State) -> State:
        """The delta that `sent` stands for; the tensors of `like` have its names, shapes and dtypes.

        Raises:
            Damaged: `encode` gives no such values. The names, shapes and dtypes are those of `sent_like`.
        """

    def sent_like(self, like: State) -> State:
        """Tensors of the names, shapes and dtypes that `encode` gives for such a delta."""


class Coder(Protocol):
    """A last stage of a chain, on bytes."""

    def compress(self, content: bytes) -> bytes:
        """The bytes to send in place of `content`."""

    def decompress(self, content: bytes, size: int) -> bytes:
        """The inverse; `size` is how many bytes are expected, and more are never made.

        Raises:
            Damaged: they are of another number.
        """


class Chain:
    """Transforms, first to last, and perhaps a coder after them.

    Args:
        stages: of the chain; without any, values are sent uncompressed.
        buffers: names of the model that are sent uncompressed in any case, as whole numbers are: a lossy
            running variance may become negative.

    Raises:
        BadInput: a coder is not the last stage.
    """

    def __init__(self, stages: Sequence[Any] = (), buffers: Collection[str] = ()) -> None:
        self._buffers = buffers
        coders = [number for number, stage in enumerate(stages) if hasattr(stage, "compress")]
        if coders and coders[0] < len(stages) - 1:
            raise BadInput("transform: entropy coding must be the last stage")
        self._coder: Coder | None = stages[-1] if coders else None
        self._stages: list[Transform] = list(stages[:-1] if coders else stages)

    def __bool__(self) -> bool:
        return bool(self._stages or self._coder)

    def encode(self, delta: State, rng: np.random.Generator, whose: str) -> Tensor:
        """The bytes of a floating delta, encoded, uint8.

        Args:
            delta: by name.
            rng: the only source of randomness.
            whose: delta it is, for messages, such as `slice decoder of client 3`.

        Raises:
            Diverged: the delta is not finite.
        """
        if not all(tensor.isfinite().all() for tensor in delta.values()):
            raise Diverged(f"{whose} left the finite numbers and cannot be encoded")
        sent = delta
        for stage in self._stages:
            sent = {**_whole(sent), **stage.encode(_floating(sent), rng)}
        content = join({name: sent[name] for name in self._shapes(delta)[-1]})
        if self._coder is None:
            return content
        return _tensor(self._coder.compress(content.numpy().tobytes()))

    def decode(self, content: Tensor, like: State) -> State:
        """The delta that the bytes stand for; the tensors of `like` have its names, shapes and dtypes.

        Raises:
            Damaged: they stand for no such delta.
        """
        if content.dtype is not torch.uint8 or content.dim() != 1:
            raise Damaged(f"an encoded payload is {content.dtype} of shape {tuple(content.shape)}, not bytes")
        *shapes, last = self._shapes(like)
        if self._coder is not None:
            size = sum(tensor.nbytes for tensor in last.values())
            content = _tensor(self._coder.decompress(content.numpy().tobytes(), size))
        sent = split(content, last)
        for stage, shape in zip(reversed(self._stages), reversed(shapes), strict=True):
            kept = {name: sent[name] for name in _whole(shape)}
            sent = {**kept, **stage.decode(sent, _floating(shape))}
        return sent

    def values(self, payload: Payload, held: State) -> State:
        """The values of a slice from a payload: as they are, or as deltas to what the receiver knows.

        Args:
            payload: as it arrived.
            held: the values that its deltas are added to, in the sequence of their rounds.
        """
        encoded = self.encoded(held)
        plain = {name: tensor for name, tensor in payload.tensors.items() if not name.startswith(DELTA)}
        if plain.keys() == held.keys():
            return plain
        values = dict(encoded)
        for name in sorted(payload.tensors.keys() - plain.keys()):
            delta = self.decode(payload.tensors[name], encoded)
            values = {key: value + delta[key] for key, value in values.items()}
        return {name: values[name] if name in values else plain[name] for name in held}

    def difference(self, values: State, held: State) -> State:
        """What is to be encoded and added to `held`."""
        return {name: value - held[name] for name, value in self.encoded(values).items()}

    def payload(self, values: State, deltas: State) -> Payload:
        """The payload of encoded deltas that lead to `values`, and of what is sent uncompressed."""
        encoded = self.encoded(values)
        plain = {name: tensor for name, tensor in values.items() if name not in encoded}
        return Payload({**deltas, **plain}, Payload.plain(values).params)

    def encoded(self, state: State) -> State:
        """The tensors that the stages see: floating ones that are no buffers."""
        return {name: tensor for name, tensor in _floating(state).items() if name not in self._buffers}

    def _shapes(self, like: State) -> list[State]:
        """Tensors as they are before the first stage, after it, and so on to the last."""
        shapes = [like]
        for stage in self._stages:
            shapes.append({**_whole(shapes[-1]), **stage.sent_like(_floating(shapes[-1]))})
        return shapes


class Codec:
    """Encodes what a client reports and decodes it at the server; and names the chain of the downlink.

    Without a chain the values themselves cross. With it the difference to the values that the client
    received crosses; what the encoding lost stays with the client and is added to its next delta (error
    feedback, arXiv 1901.09847). Integer tensors and buffers are always sent uncompressed.

    Args:
        up: the stages of the uplink, first to last.
        down: those of the downlink.
        seeded_start: clients make the first model from the seed, and nothing of it crosses.
        buffers: names of the model's buffers.
    """

    def __init__(
        self,
        up: Sequence[Any] = (),
        down: Sequence[Any] = (),
        seeded_start: bool = False,
        buffers: Collection[str] = (),
    ) -> None:
        self.up = Chain(up, buffers)
        self.down = Chain(down, buffers)
        self.seeded_start = seeded_start

    def encode(
        self, values: State, received: State, errors: State, rng: np.random.Generator, whose: str
    ) -> tuple[Payload, State]:
        """Encodes a slice at the client.

        Args:
            values: the trained tensors.
            received: the same tensors as they were received in this round.
            errors: what earlier encodings of this slice lost, by name; absent names lost nothing.
            rng: the only source of randomness.
            whose: slice it is, for messages.

        Returns:
            The payload, and the new errors.

        Raises:
            Diverged: the delta is not finite.
        """
        if not self.up:
            return Payload.plain(values), {}
        delta = self.up.difference(values, received)
        delta |= {name: delta[name] + error for name, error in errors.items()}
        content = self.up.encode(delta, rng, whose)
        arriving = self.up.decode(content, delta)
        lost = {name: delta[name] - arriving[name] for name in delta}
        return self.up.payload(values, {DELTA: content}), lost

    def decode(self, payload: Payload, received: State) -> State:
        """The trained values of a slice at the server, which sent `received` in this round."""
        return self.up.values(payload, received)


def _floating(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def _whole(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not tensor.is_floating_point()}


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
