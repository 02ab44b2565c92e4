"""Weights & Biases' own file of a run, read back."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def read_wandb(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Reads W&B's own file: LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    content, at, parts = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at < len(content):
        if (left := -at % 2**15) and left < 7:
            at += left
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, in order."""
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in read_wandb(path)
        if record.WhichOneof("record_type") == "history"
    ]
