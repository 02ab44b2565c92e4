"""Messages taken apart and put together again with whatever lies inside, for tests of who reads them."""

import json
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from toy import Toy


@dataclass
class Parts:
    """The bytes of a message.

    Attributes:
        tensors: the entries of the safetensors header, by name.
        header: of the message.
        body: the bytes of all tensors.
    """

    tensors: Any
    header: Any
    body: bytes

    @classmethod
    def of(cls, content: bytes) -> "Parts":
        length = int.from_bytes(content[:8], "little")
        tensors = json.loads(content[8 : 8 + length])
        header = json.loads(tensors.pop("__metadata__")["header"])
        return cls(tensors, header, content[8 + length :])

    def to_bytes(self) -> bytes:
        return assemble(json.dumps(self.header), self.tensors, self.body)


def assemble(header: str, tensors: Any = None, body: bytes = b"") -> bytes:
    """A message from the text of its header."""
    outer = json.dumps({"__metadata__": {"header": header}, **(tensors or {})}).encode()
    return struct.pack("<Q", len(outer)) + outer + body


class Rich(Toy):
    """The toy with what else a state_dict may hold: a counter, a table, a matrix and half precision."""

    def __init__(self, **toy: Any) -> None:
        super().__init__(**toy)
        self.shared.more = nn.Module()
        self.shared.more.register_buffer("count", torch.tensor(3))
        self.shared.more.register_buffer("table", torch.tensor([2, 0, 1]))
        self.shared.more.register_buffer("halves", torch.ones(2, 3, dtype=torch.bfloat16))
        self.shared.more.register_buffer("matrix", torch.arange(300.0).view(12, 25))
