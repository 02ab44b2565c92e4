"""A message of the federation inside one of Flower's: its bytes as they are, and a few words."""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

BYTES, WORDS = "bytes", "words"
CLIENT, HASH, PROBLEM = "client", "sha256", "problem"
"""The words beside it: who a node is, the configuration that it agreed to, why there is no update."""
MEMORY_LOST = "memory lost"
"""The problem of a client that cannot go on from its last round."""


def wrap(content: bytes, words: dict[str, str | int]) -> RecordDict:
    """What crosses: the bytes of one message, or none, and a few words."""
    records = RecordDict({WORDS: ConfigRecord(words)})
    if content:
        array = Array(dtype="uint8", shape=(len(content),), stype="safetensors", data=content)
        records[BYTES] = ArrayRecord({BYTES: array})
    return records


def open_bytes(records: RecordDict) -> bytes:
    """The bytes of the message; none where there is none."""
    found = records.array_records.get(BYTES, {}).get(BYTES)
    return b"" if found is None else found.data


def open_words(records: RecordDict) -> dict[str, object]:
    """The words beside the message."""
    return dict(records.config_records.get(WORDS, {}))
