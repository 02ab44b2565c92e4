"""Errors of a configuration in words: which key, which value, what is allowed."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from fedlight.runtime.secret import masked

GLOBAL_GROUPS = ("experiment", "sweeps")
"""Groups whose files set keys of other groups."""
OPTIONAL_GROUPS = frozenset(
    ("algorithm", "transform", "transport", "privacy", "aggregation", "early_stopping", "finetuning")
)
SWEEPER = "hydra.sweeper"


def describe_invalid(error: ValidationError, known: Collection[str]) -> str:
    """What is wrong with each key of a configuration.

    Args:
        error: of pydantic.
        known: every dotted key of the schema.
    """
    return "; ".join(_describe_key(details, known) for details in error.errors())


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
