"""JSON from elsewhere: no key twice, no NaN, no deep nesting, no field beside those of a schema."""

import json
import re
from itertools import accumulate
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

ESCAPED = re.compile(r"\\.", re.DOTALL)
BRACKETS = re.compile(r"[\[\]{}]")


class Strict(BaseModel):
    """The schema of an object; an unknown field and a value of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def parse_json(text: str, depth: int, containers: int, values: int) -> Any:
    """The value of a JSON text.

    Args:
        text: whose length the caller has limited; short strings take some 15 bytes of memory a character.
        depth: the largest number of lists and objects inside each other.
        containers: the largest number of lists and objects, which take most time and memory.
        values: the largest number of all values.

    Raises:
        ValueError: it is no JSON, has more lists and objects, names a key twice, or holds NaN or an infinity.
    """
    outside_strings = "".join(ESCAPED.sub("", text).split('"')[::2])
    if outside_strings.count("[") + outside_strings.count("{") > containers:
        raise ValueError(f"JSON holds more than {containers} lists and objects")
    if outside_strings.count(",") >= values:
        raise ValueError(f"JSON holds more than {values} values")
    steps = (1 if bracket in "[{" else -1 for bracket in BRACKETS.findall(outside_strings))
    if max(accumulate(steps), default=0) > depth:
        raise ValueError(f"JSON is nested more than {depth} deep")
    return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse)


def first_error(error: ValidationError) -> str:
    """The first thing that does not fit a schema: where it is, and what is wrong."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("JSON names a key twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON holds {constant}")
