"""Errors of a configuration in words: which key, which value, what is allowed."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedlight.runtime.secret import masked

GLOBAL_GROUPS = ("experiment", "sweeps")
"""Groups whose files set keys of other groups."""
OPTIONAL_GROUPS = frozenset(
    ("algorithm", "transform", "transport", "privacy", "aggregation", "early_stopping", "finetuning")
)
SWEEPER = "hydra.sweeper"
NAMES_OF_TYPES = {
    "integer": ("an integer", "integers"),
    "number": ("a number", "numbers"),
    "string": ("a text", "texts"),
}
"""One and several values of a type of JSON schema."""


def describe_invalid(
    error: ValidationError, known: Collection[str], unions: Mapping[str, Any], config: Mapping[Any, Any]
) -> str:
    """What is wrong with each key of a configuration.

    Args:
        error: of pydantic, which has an error for each type of a union.
        known: every dotted key of the schema.
        unions: dotted key: its type, of those that take values of several types.
        config: that is invalid.
    """
    reasons: dict[str, None] = {}  # a set that keeps its order
    for details in error.errors():
        union = next((key for key in unions if _is_within(details["loc"], key)), None)
        reason = _describe_union(union, unions[union], config) if union else _describe_key(details, known)
        reasons[reason] = None
    return "; ".join(reasons)


def _is_within(place: tuple[int | str, ...], key: str) -> bool:
    """Whether an error is that of one type of a union, or of an element of it."""
    parts = tuple(key.split("."))
    return len(place) > len(parts) and place[: len(parts)] == parts


def _describe_union(key: str, type_: Any, config: Any) -> str:
    value = config
    for part in key.split("."):
        value = value[part]
    schema = TypeAdapter(type_).json_schema()
    return (
        f"{key} must be {_join([_describe_type(one) for one in schema['anyOf']])}; got {masked(value, key)!r}"
    )


def _describe_type(schema: Mapping[str, Any], several: bool = False) -> str:
    """A type in words, from its JSON schema: `an integer of at least 1`, or for several `integers of ...`."""
    if "const" in schema or "enum" in schema:
        return _join([repr(value) for value in schema.get("enum", [schema.get("const")])])
    type_ = schema["type"]
    if type_ == "null":
        return type_
    if type_ == "array":
        return f"a list of {_describe_type(schema.get('items', {'type': 'string'}), several=True)}"
    singular, plural = NAMES_OF_TYPES[type_]
    words = plural if several else singular
    return words + (f" of at least {schema['minimum']}" if "minimum" in schema else "")


def _join(options: list[str]) -> str:
    *others, last = options
    return f"{', '.join(others)} or {last}" if others else last


def describe_unknown(key: str, known: Collection[str]) -> str:
    """Why a key cannot be set, and the key that was probably meant.

    Args:
        key: dotted, as it was typed.
        known: every dotted key of the schema.
    """
    section, _, name = key.rpartition(".")
    if key in OPTIONAL_GROUPS:
        return (
            f"{key} is not chosen, so it has no key to be set; {key}=NAME chooses it (--help lists the names)"
        )
    if key in known:
        return f"{key} has no value in the configuration that it could replace; ++{key}=... sets it"
    unknown = f"{key} is not a key of the configuration"
    if section == SWEEPER:
        return f"{unknown}; hydra/sweeper=optuna, a search, and planned, a grid, have keys of their own"
    siblings = sorted(other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section)
    if section and siblings:
        close = get_close_matches(name, siblings, n=1)
        return f"{unknown}; " + (
            f"did you mean {section}.{close[0]}?" if close else f"{section} has {', '.join(siblings)}"
        )
    close = get_close_matches(key, known, n=1)
    return unknown + (f"; did you mean {close[0]}?" if close else "")


def _describe_key(details: Any, known: Collection[str]) -> str:
    key = ".".join(str(part) for part in details["loc"])
    value, message = details["input"], details["msg"][0].lower() + details["msg"][1:]
    if details["type"] == "extra_forbidden" and key in GLOBAL_GROUPS and isinstance(value, dict):
        return (
            f"{key}: the file of {key}=NAME was read as a section of its own ({', '.join(value)}); "
            "its first line must be `# @package _global_`, without a byte-order mark before it"
        )
    if details["type"] == "extra_forbidden":
        return describe_unknown(key, known)
    if details["type"] == "missing":
        return f"{key}: {message}"
    hint = ""
    if details["type"] == "string_type" and isinstance(value, int | float):
        hint = "; in a YAML file, put it in quotes"
    return f"{key}: {message}, got {masked(value, key)!r}{hint}"
