"""A message of the federation inside one of Flower's: its bytes as they are, and a few words."""

from typing import Annotated

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from fedlight.runtime.errors import Damaged
from fedlight.runtime.printable import printable
from fedlight.runtime.untrusted import Strict, first_error

BYTES, WORDS = "bytes", "words"
CLIENT, HASH, PROBLEM = "client", "sha256", "problem"
"""The words beside it: who a node is, the configuration that it agreed to, why there is no update."""
MEMORY_LOST = "memory lost"
"""The problem of a client that cannot go on from its last round."""
FAILED = "failed"
"""The problem of a client where something else is wrong: what it is stays there."""


def wrap(content: bytes, words: dict[str, str | int]) -> RecordDict:
    """What crosses: the bytes of one message, or none, and a few words."""
    records = RecordDict({WORDS: ConfigRecord(words)})
    if content:
        array = Array(dtype="uint8", shape=(len(content),), stype="safetensors", data=content)
        records[BYTES] = ArrayRecord({BYTES: array})
    return records


class Words(Strict):
    """The words beside a message: the attributes have the names above."""

    client: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    sha256: Annotated[str, Field(max_length=64, pattern="^[0-9a-z]*$")] | None = None
    problem: Annotated[str, Field(max_length=2**10)] | None = None


def open_bytes(records: RecordDict) -> bytes:
    """The bytes of the message; none where there is none.

    Raises:
        Damaged: there are other records than those of `wrap`.
    """
    if records.keys() - {BYTES, WORDS}:
        raise Damaged("there are more records than a message and its words")
    if BYTES not in records:
        return b""
    record = records[BYTES]
    if not isinstance(record, ArrayRecord) or record.keys() != {BYTES}:
        raise Damaged("there is not one array of bytes")
    return record[BYTES].data


def open_words(records: RecordDict) -> dict[str, object]:
    """The words beside the message, all of them printable; a problem where they cannot be read."""
    try:
        words = Words.model_validate(dict(records.config_records.get(WORDS, {})))
    except ValidationError as error:
        return {PROBLEM: printable(f"words that cannot be read: {first_error(error)}")}
    found = words.model_dump(exclude_none=True)
    return {**found, PROBLEM: printable(words.problem)} if words.problem else found
