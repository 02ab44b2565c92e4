"""The messages between the server and a client: their schema, and their encoding as bytes.

Each message names its federation (`cell`), the `round` (1..R; in an `Evaluation` the rounds completed) and
the `client` (0..K-1), and has `payloads`, by the name of the slice, or `AUX` for the auxiliary state of an
algorithm. Encoded, it is a safetensors file: the tensors of its payloads, named `payload/tensor`, and a JSON
header with all other fields. A transport sends these bytes, and the journal stores them for a restart.

The annotations of the fields below are the schema of a message: `from_bytes` accepts no other field, type or
range. Requirements that depend on the receiver, such as the shapes of tensors, are checked in `admission`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError, create_model
from safetensors import SafetensorError, TensorSpec, serialize
from safetensors.torch import load
from torch import Tensor

from fedlight.runtime.errors import Damaged
from fedlight.runtime.untrusted import Strict, first_error, parse_json

MAX_BYTES = 2**34  # of a message
MAX_HEADER = 2**22  # bytes of its header, which names its tensors
MAX_TENSORS = 2**14
MAX_DEPTH = 3  # of nested lists and objects in a header
MAX_NAMES = 2**10  # payloads of a message, slices of an uplink, metrics of a model

State: TypeAlias = dict[str, Tensor]
"""Tensors by name, on the CPU."""

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^/]*$")]
CellId = Annotated[str, Field(min_length=1, max_length=256)]
Number = Annotated[int, Field(ge=0, lt=2**31)]  # of a client, of a round, 0 for none
RoundNumber = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Payload:
    """One slice, or the auxiliary state of an algorithm, as it is sent.

    Attributes:
        tensors: that are sent, encoded or plain.
        params: number of scalars that they encode.
    """

    tensors: State
    params: int

    @classmethod
    def plain(cls, tensors: State) -> "Payload":
        """A payload of uncompressed tensors."""
        return cls(tensors, sum(tensor.numel() for tensor in tensors.values()))

    @property
    def bytes(self) -> int:
        """The size of all tensors that are sent."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Broadcast:
    """The message from the server to a client at the start of a round.

    Attributes:
        previous: the round in which the client last took part; 0 at first contact, at which the client
            receives all slices.
        uplink: the slices that the client is to report.
        drops_out: the client receives the broadcast and never reports (a simulated fault).
    """

    cell: CellId
    round: RoundNumber
    client: Number
    previous: Number
    uplink: Annotated[tuple[Name, ...], Field(strict=False, max_length=MAX_NAMES)]
    drops_out: bool
    payloads: dict[str, Payload]


@dataclass(frozen=True)
class Update:
    """The message from a client to the server after its local epochs; the client sends nothing else.

    Attributes:
        num_examples: n_k, the number of the client's training images; 0 where client-level privacy hides it.
        loss: mean training loss of an image over the last local epoch; None where privacy hides it.
    """

    cell: CellId
    round: RoundNumber
    client: Number
    num_examples: Count
    loss: Finite | None
    payloads: dict[str, Payload]


@dataclass(frozen=True)
class Evaluation:
    """The request to a client to evaluate its own model; part of the experiment, and not in the ledger.

    Attributes:
        previous: the round in which the client last took part, 0 for never.
        draw: whether to draw images from the model and to score them, or only to fingerprint it.
        payloads: the slices of the global model; the client replaces those that are private to it.
    """

    cell: CellId
    round: Number
    client: Number
    previous: Number
    draw: bool
    payloads: dict[str, Payload]


@dataclass(frozen=True)
class Scores:
    """The answer of a client to an `Evaluation`.

    Attributes:
        sha256: of the state_dict of its model.
        metrics: name: value; empty where nothing was scored.
        payloads: images for the sample grid; empty where none were drawn.
    """

    client: Number
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    metrics: Annotated[dict[Name, Finite], Field(max_length=MAX_NAMES)]
    payloads: dict[str, Payload]


MaskStep: TypeAlias = Literal["keys", "key list", "shares", "share list", "survivors", "revealed"]
"""A step of secure aggregation; keys, shares and revealed shares are sent by clients, the others to them."""


@dataclass(frozen=True)
class MaskMessage:
    """A message of secure aggregation beside broadcasts and updates, in either direction.

    Attributes:
        step: says what the payloads are; `secure.mask_client` and `secure.mask_server` define them.
        payloads: tensors of bytes by the name of a client, of a slice or both; none is a parameter.
    """

    cell: CellId
    round: RoundNumber
    client: Number
    step: MaskStep
    payloads: dict[str, Payload]


Message: TypeAlias = Broadcast | Update | Evaluation | Scores | MaskMessage
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Broadcast, Update, Evaluation, Scores, MaskMessage)
}
AUX = "algorithm"  # name of the payload with the auxiliary state


class TensorEntry(Strict):
    """A tensor in the header."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[list[Count], Field(max_length=16)]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


class Metadata(Strict):
    """The rest of the header."""

    header: str


Entries = TypeAdapter(
    Annotated[dict[Annotated[str, Field(max_length=512)], TensorEntry], Field(max_length=MAX_TENSORS)]
)


def _header_model(kind: type[Any]) -> type[Strict]:
    """The schema of a message's header: all fields but the payloads, and the parameters of each payload."""
    header_fields: dict[str, Any] = {
        field.name: (field.type, ...) for field in fields(kind) if field.name != "payloads"
    }
    header_fields["kind"] = str, ...
    header_fields["params"] = Annotated[dict[Name, Count], Field(max_length=MAX_NAMES)], ...
    return create_model(f"{kind.__name__}Header", __base__=Strict, **header_fields)


HEADERS = {name: _header_model(kind) for name, kind in KINDS.items()}


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
    """Decodes an untrusted message.

    The size of the header is checked before it is parsed, and the header before any tensor is read.

    Raises:
        Damaged: the bytes are no message of the schema. The text is one line; its length and characters are
            untrusted.
    """
    try:
        entries, text = _open_header(content)
        header = parse_json(text, MAX_DEPTH, 3, 3 * MAX_NAMES)  # itself, params, and uplink or metrics
        kind = header["kind"]
        plain = HEADERS[kind].model_validate(header)
        Entries.validate_python(entries)
        groups = _groups(load(content))
    except ValidationError as error:
        raise Damaged(f"this is no message of a federation ({first_error(error)})") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Damaged(f"these bytes hold no tensors with a header ({error})") from error
    params = dict(plain)["params"]
    if unknown := groups.keys() - params.keys():
        raise Damaged(f"this is no message of a federation (it has tensors of no payload, {min(unknown)!r})")
    payloads = {name: Payload(groups.get(name, {}), count) for name, count in params.items()}
    values = {name: value for name, value in plain if name not in ("kind", "params")}
    return KINDS[kind](**values, payloads=payloads)


def _open_header(content: bytes) -> tuple[dict[str, Any], str]:
    """The entries of the tensors and the text of the message's header, from untrusted bytes.

    Raises:
        ValueError: too many bytes, too few, or no header.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) > MAX_BYTES:
        raise ValueError(f"{len(content)} bytes; at most {MAX_BYTES} are allowed")
    if length > min(MAX_HEADER, len(content) - 8):
        raise ValueError(f"a header of {length} in {len(content)} bytes; at most {MAX_HEADER} are allowed")
    entries = parse_json(content[8 : 8 + length].decode(), MAX_DEPTH, 3 * MAX_TENSORS + 2, 20 * MAX_TENSORS)
    if not isinstance(entries, dict):
        raise ValueError("the header is no object")
    return entries, Metadata.model_validate(entries.pop("__metadata__", None)).header


def pack(header: Mapping[str, Any], groups: Mapping[str, State]) -> bytes:
    """Encodes a JSON header and named groups of tensors as a safetensors file."""
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
    """Decodes the bytes of `pack`, from a trusted file; a group without tensors is absent.

    Raises:
        Damaged: `pack` did not return these bytes.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"])
        if not isinstance(header, dict):
            raise TypeError("the header is no object")
        return header, _groups(load(content))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"these bytes hold no tensors with a header ({error})") from error


def _groups(tensors: State) -> dict[str, State]:
    """Sorts tensors named `group/name` into their groups."""
    groups: dict[str, State] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def fingerprint(content: bytes) -> str:
    """The first 16 digits of the SHA-256 of the bytes, for names of files."""
    return hashlib.sha256(content).hexdigest()[:16]
