"""Encoding of slices as payloads: as values, or as deltas encoded by a chain of transforms."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlight.federation.messages import Payload, State
from fedlight.federation.packing import join, split
from fedlight.runtime.errors import BadInput, Damaged, Diverged

DELTA = "delta/"  # prefix of the name of an encoded delta in a payload; the rest is its round


class Transform(Protocol):
    """One stage of a chain; it encodes the floating-point tensors of one slice, and no integers.

    On the uplink the client keeps what a chain loses and adds it to its next delta (error feedback, `Codec`).
    """

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        """The tensors that are sent instead of `delta`; all randomness comes from `rng`."""

    def decode(self, sent: State, like: State) -> State:
        """The decoded delta.

        Args:
            sent: untrusted values, with the names, shapes and dtypes of `sent_like`; a later stage of the
                chain may have changed them, as rounding does.
            like: tensors with the names, shapes and dtypes of the delta.

        Raises:
            Damaged: neither `encode` nor a later stage gives such values, for example NaN.
        """

    def sent_like(self, like: State) -> State:
        """Tensors with the names, shapes and dtypes that `encode` returns for such a delta."""


class Coder(Protocol):
    """A last stage of a chain, on bytes."""

    def compress(self, content: bytes) -> bytes:
        """The bytes that are sent instead of `content`."""

    def decompress(self, content: bytes, size: int) -> bytes:
        """The inverse of `compress`.

        Args:
            content: untrusted bytes.
            size: number of bytes that the result must have; no more are ever produced.

        Raises:
            Damaged: the result has another number of bytes.
        """


class Chain:
    """Transforms, first to last, and optionally a coder after them.

    Args:
        stages: of the chain; with none, values are sent uncompressed.
        buffers: names of tensors that are always sent uncompressed, as integers are: a lossy running variance
            may become negative.

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
        """Encodes a floating-point delta as bytes, uint8.

        Args:
            delta: tensors by name.
            rng: the only source of randomness.
            whose: names the delta in messages, such as `slice decoder of client 3`.

        Raises:
            Diverged: the delta is not finite.
        """
        if not all(tensor.isfinite().all() for tensor in delta.values()):
            raise Diverged(f"{whose} left the finite numbers and cannot be encoded")
        sent = delta
        for stage in self._stages:
            sent = {**_integers(sent), **stage.encode(_floating(sent), rng)}
        content = join({name: sent[name] for name in self._shapes(delta)[-1]})
        if self._coder is None:
            return content
        return _tensor(self._coder.compress(content.numpy().tobytes()))

    def decode(self, content: Tensor, like: State) -> State:
        """Decodes untrusted bytes; the tensors of `like` have the names, shapes and dtypes of the delta.

        Raises:
            Damaged: the bytes are no encoding of such a delta.
        """
        if content.dtype is not torch.uint8 or content.dim() != 1:
            raise Damaged(f"an encoded payload is {content.dtype} of shape {tuple(content.shape)}, not bytes")
        *shapes, last = self._shapes(like)
        if self._coder is not None:
            size = sum(tensor.nbytes for tensor in last.values())
            content = _tensor(self._coder.decompress(content.numpy().tobytes(), size))
        sent = split(content, last)
        for stage, shape in zip(reversed(self._stages), reversed(shapes), strict=True):
            integers = {name: sent[name] for name in _integers(shape)}
            sent = {**integers, **stage.decode(sent, _floating(shape))}
        return sent

    def values(self, payload: Payload, reference: State) -> State:
        """The values of a slice from a payload, which has plain values or deltas.

        Args:
            payload: as it arrived.
            reference: values of the receiver, to which the deltas are added in the order of their rounds.
        """
        encoded = self.encoded(reference)
        plain = {name: tensor for name, tensor in payload.tensors.items() if not name.startswith(DELTA)}
        if plain.keys() == reference.keys():
            return plain
        values = dict(encoded)
        for name in sorted(payload.tensors.keys() - plain.keys()):
            delta = self.decode(payload.tensors[name], encoded)
            values = {key: value + delta[key] for key, value in values.items()}
        return {name: values[name] if name in values else plain[name] for name in reference}

    def difference(self, values: State, reference: State) -> State:
        """The delta from `reference` to `values`, of the tensors that are encoded."""
        return {name: value - reference[name] for name, value in self.encoded(values).items()}

    def payload(self, values: State, deltas: State) -> Payload:
        """The payload with encoded deltas that lead to `values`, and with the uncompressed tensors."""
        encoded = self.encoded(values)
        plain = {name: tensor for name, tensor in values.items() if name not in encoded}
        return Payload({**deltas, **plain}, Payload.plain(values).params)

    def encoded(self, state: State) -> State:
        """The tensors that the chain encodes: those of floating point that are no buffers."""
        return {name: tensor for name, tensor in _floating(state).items() if name not in self._buffers}

    def _shapes(self, like: State) -> list[State]:
        """Tensors like the input of the first stage, its output, and so on to the output of the last."""
        shapes = [like]
        for stage in self._stages:
            shapes.append({**_integers(shapes[-1]), **stage.sent_like(_floating(shapes[-1]))})
        return shapes


class Codec:
    """Compression of uplink and downlink; encodes updates at the client and decodes them at the server.

    Without a chain the values are sent. With it the difference to the values that the client received is
    sent; the client keeps the error of the encoding and adds it to its next delta (error feedback, arXiv
    1901.09847). Integer tensors and buffers are always sent uncompressed.

    Args:
        up: stages of the uplink, first to last.
        down: stages of the downlink, first to last.
        seeded_start: clients make the first model from the seed, and it is not sent.
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
            errors: of earlier encodings of this slice, by name; zero where a name is absent.
            rng: the only source of randomness.
            whose: names the slice in messages.

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
        decoded = self.up.decode(content, delta)
        new_errors = {name: delta[name] - decoded[name] for name in delta}
        return self.up.payload(values, {DELTA: content}), new_errors

    def decode(self, payload: Payload, received: State) -> State:
        """The trained values of a slice, at the server, which sent `received` in this round."""
        return self.up.values(payload, received)


def _floating(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def _integers(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not tensor.is_floating_point()}


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
