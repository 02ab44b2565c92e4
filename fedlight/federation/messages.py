"""All that may cross between the server and a client, and its one form as bytes.

Each message names its federation (`cell`), the `round` (1..R; in an `Evaluation` the rounds completed) and
the `client` (0..K-1), and carries `payloads`: slice, or `EXTRAS`: what is sent. It is the bytes of a
safetensors file: the tensors of its payloads, named `payload/tensor`, and a JSON header with everything else.
The same bytes are what a transport carries, what is kept for a restart, and what the ledger counts.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from safetensors import SafetensorError, TensorSpec, serialize
from safetensors.torch import load
from torch import Tensor

from fedlight.runtime.errors import Damaged

State: TypeAlias = dict[str, Tensor]
"""Tensors by name, on the CPU."""


@dataclass(frozen=True)
class Payload:
    """One slice, or the extras of an algorithm, encoded as it crosses.

    Attributes:
        tensors: what is sent.
        params: the number of scalars that it stands for; as many as are sent where nothing is encoded.
    """

    tensors: State
    params: int

    @classmethod
    def plain(cls, tensors: State) -> "Payload":
        """Tensors that cross as they are."""
        return cls(tensors, sum(tensor.numel() for tensor in tensors.values()))

    @property
    def bytes(self) -> int:
        """The size of all tensors that are sent."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Broadcast:
    """The message from the server to a client at the start of a round.

    Attributes:
        previous: the round in which the client last took part; 0 at first contact, where the whole model
            crosses.
        uplink: the slices that the client is to report.
        drops_out: the client receives the broadcast and never reports (a simulated fault).
    """

    cell: str
    round: int
    client: int
    previous: int
    uplink: tuple[str, ...]
    drops_out: bool
    payloads: dict[str, Payload]


@dataclass(frozen=True)
class Update:
    """The message from a client to the server after its local epochs: all that leaves the client.

    Attributes:
        num_examples: n_k, the number of the client's training images; 0 where client-level privacy hides it.
        loss: mean training loss of an image over the last local epoch; None where privacy hides it.
    """

    cell: str
    round: int
    client: int
    num_examples: int
    loss: float | None
    payloads: dict[str, Payload]


@dataclass(frozen=True)
class Evaluation:
    """The request to a client to evaluate its own model; an instrument of the experiment, not in the ledger.

    Attributes:
        previous: the round in which the client last took part, 0 for never.
        draw: whether to draw images from the model and to score them, or only to fingerprint it.
        payloads: the slices of the global model; the client puts its private ones over them.
    """

    cell: str
    round: int
    client: int
    previous: int
    draw: bool
    payloads: dict[str, Payload]


@dataclass(frozen=True)
class Scores:
    """A client's answer to `Evaluation`.

    Attributes:
        sha256: fingerprint of the whole state_dict of its model.
        metrics: name: value; empty where nothing was scored.
        payloads: what the evaluator shows of the images; empty where none were drawn.
    """

    client: int
    sha256: str
    metrics: dict[str, float]
    payloads: dict[str, Payload]


Message: TypeAlias = Broadcast | Update | Evaluation | Scores
KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Broadcast, Update, Evaluation, Scores)}
EXTRAS = "algorithm"  # the payload that an algorithm adds to the slices


def to_bytes(message: Message) -> bytes:
    """The message as bytes; equal messages give equal bytes."""
    header: dict[str, Any] = {
        field.name: getattr(message, field.name) for field in fields(message) if field.name != "payloads"
    }
    header["kind"] = type(message).__name__
    header["params"] = {name: payload.params for name, payload in message.payloads.items()}
    named = {name: payload.tensors for name, payload in message.payloads.items()}
    return pack(header, named)


def from_bytes(content: bytes) -> Any:
    """The message that the bytes hold.

    Raises:
        Damaged: they hold no message.
    """
    header, named = unpack(content)
    try:
        kind, params = KINDS[header.pop("kind")], header.pop("params")
        payloads = {name: Payload(named.get(name, {}), count) for name, count in params.items()}
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in header.items()}
        return kind(**plain, payloads=payloads)
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"this is no message of a federation ({error!r})") from error


def pack(header: Mapping[str, Any], groups: Mapping[str, State]) -> bytes:
    """A JSON header and named groups of tensors as the bytes of a safetensors file."""
    tensors = {
        f"{group}/{name}": tensor.contiguous()
        for group, state in groups.items()
        for name, tensor in state.items()
    }
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    return serialize(specs, {"header": json.dumps(header)})


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, State]]:
    """What `pack` was given; a group without tensors is absent.

    Raises:
        Damaged: the bytes are not of `pack`.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"])
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"these bytes hold no tensors with a header ({error})") from error
    groups: dict[str, State] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return header, groups


def fingerprint(content: bytes) -> str:
    """The first 16 digits of the SHA-256 of a message: its name on disk."""
    return hashlib.sha256(content).hexdigest()[:16]
