"""A message of the federation inside a message of Flower: its bytes, and a few words beside them."""

from typing import Annotated

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from fedlight.runtime.errors import Damaged
from fedlight.runtime.printable import printable
from fedlight.runtime.untrusted import Strict, first_error

BYTES, WORDS = "bytes", "words"
CLIENT, HASH, PROBLEM = "client", "sha256", "problem"
"""The words beside the bytes: the node's client number, the hash of its agreement, why it has no update."""
MEMORY_LOST = "memory lost"
"""The problem of a client that cannot continue from its last round."""
FAILED = "failed"
"""The problem of a client after any other error; the details are not sent."""


def wrap(content: bytes, words: dict[str, str | int]) -> RecordDict:
    """The records of a Flower message: the bytes of a message of the federation, or none, and a few words."""
    records = RecordDict({WORDS: ConfigRecord(words)})
    if content:
        array = Array(dtype="uint8", shape=(len(content),), stype="safetensors", data=content)
        records[BYTES] = ArrayRecord({BYTES: array})
    return records


class Words(Strict):
    """The schema of the words beside a message."""

    client: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    sha256: Annotated[str, Field(max_length=64, pattern="^[0-9a-z]*$")] | None = None
    problem: Annotated[str, Field(max_length=2**10)] | None = None


def open_bytes(records: RecordDict) -> bytes:
    """The bytes of the message; empty where there are none.

    Raises:
        Damaged: the records are not those of `wrap`.
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
    """The words beside the message, in printable characters; a problem where they are invalid."""
    try:
        words = Words.model_validate(dict(records.config_records.get(WORDS, {})))
    except ValidationError as error:
        return {PROBLEM: printable(f"invalid words: {first_error(error)}")}
    fields = words.model_dump(exclude_none=True)
    return {**fields, PROBLEM: printable(words.problem)} if words.problem else fields
