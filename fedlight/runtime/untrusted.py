"""Parsers of untrusted YAML and JSON, which limit size and depth and accept plain values only."""

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

MAX_YAML_BYTES = 2**18  # bytes of a file; a cell's configuration has about 2**12
MAX_YAML_DEPTH = 32  # levels; a cell's configuration has 5
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times faster
YAML_TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {f"{YAML_TAG}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}
ESCAPED = re.compile(r"\\.", re.DOTALL)
BRACKETS = re.compile(r"[\[\]{}]")


def read_yaml(path: Path) -> Any:
    """Reads a YAML file of dicts with strings as keys, lists, strings, numbers, booleans and None.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML, too large, nested too deep, or has tags such as `!!binary`, dates, aliases
            or keys that are no strings.
    """
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"it is larger than {MAX_YAML_BYTES:,} bytes")
    try:
        text = content.decode()
        _check_events(text)
        loader = YAML_LOADER(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_tags(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _check_events(text: str) -> None:
    """Rejects depth and aliases before the recursive construction of nodes."""
    depth = 0
    for event in yaml.parse(text, Loader=YAML_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it refers to an anchor, *{event.anchor}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_YAML_DEPTH} levels")


def _check_tags(node: yaml.Node) -> None:
    if node.tag not in PLAIN_TAGS:
        line = node.start_mark.line + 1
        raise ValueError(f"line {line} holds a {node.tag.removeprefix(YAML_TAG)}, which is no plain value")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != f"{YAML_TAG}str":
                raise ValueError(f"line {key.start_mark.line + 1} has a key that is no text")
            _check_tags(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_tags(item)


class Strict(BaseModel):
    """Base of a schema; unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def parse_json(text: str, depth: int, containers: int, values: int) -> Any:
    """Parses a JSON text.

    Args:
        text: its length is limited by the caller; short strings take about 15 bytes of memory a character.
        depth: maximum nesting of lists and objects.
        containers: maximum number of lists and objects, which take most time and memory.
        values: maximum number of values.

    Raises:
        ValueError: it is no JSON, exceeds a limit, names a key twice, or holds NaN or an infinity.
    """
    outside_strings = "".join(ESCAPED.sub("", text).split('"')[::2])
    if outside_strings.count("[") + outside_strings.count("{") > containers:
        raise ValueError(f"JSON holds more than {containers} lists and objects")
    if outside_strings.count(",") >= values:
        raise ValueError(f"JSON holds more than {values} values")
    steps = (1 if bracket in "[{" else -1 for bracket in BRACKETS.findall(outside_strings))
    if max(accumulate(steps), default=0) > depth:
        raise ValueError(f"JSON is nested more than {depth} deep")
    return json.loads(text, object_pairs_hook=_reject_repeats, parse_constant=_reject_constant)


def first_error(error: ValidationError) -> str:
    """Location and message of the first error."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def _reject_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("JSON names a key twice")
    return fields


def _reject_constant(constant: str) -> None:
    raise ValueError(f"JSON holds {constant}")
