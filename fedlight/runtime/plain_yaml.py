"""YAML that may come from elsewhere: plain values only, in a file of limited size and depth."""

from pathlib import Path
from typing import Any

import yaml

LARGEST = 2**18  # bytes of a file; a cell's configuration has about 2**12
DEEPEST = 32  # levels; a cell's configuration has 5
BASE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times the speed, where it was compiled
PREFIX = "tag:yaml.org,2002:"
PLAIN = {f"{PREFIX}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: dicts with texts as keys, lists, texts, numbers, booleans and None.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such YAML: too large, too deep, with a tag such as `!!binary`, a date, an anchor
            that is used again, or no YAML at all.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST:,} bytes")
    try:
        text = content.decode()
        _check_events(text)
        loader = BASE(text)
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
    """Refuses depth and aliases before anything is built, for that is recursive."""
    depth = 0
    for event in yaml.parse(text, Loader=BASE):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it refers to an anchor, *{event.anchor}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _check_tags(node: yaml.Node) -> None:
    if node.tag not in PLAIN:
        line = node.start_mark.line + 1
        raise ValueError(f"line {line} holds a {node.tag.removeprefix(PREFIX)}, which is no plain value")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != f"{PREFIX}str":
                raise ValueError(f"line {key.start_mark.line + 1} has a key that is no text")
            _check_tags(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_tags(item)
