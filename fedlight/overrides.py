"""Overrides of the command line as they are meant: names are text, and null chooses no file of a group."""

import re
from collections.abc import Callable, Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from fedlight.config import TEXT_KEYS

GROUPS = frozenset(
    ("algorithm", "data", "evaluation", "experiment", "logger", "method", "model", "optimizer", "partition")
    + ("privacy", "sweeps", "trainer", "transform", "transport", "hydra/launcher", "hydra/sweeper")
)
NONE = "none"  # the file of an optional group that leaves it out
CHOICE = re.compile(r"(\s*(?:choice|shuffle|sort)\()(.*)(\)\s*)", re.DOTALL)
QUOTING = re.compile(r"['\"\\()\[\]{}$]")  # in a value that is not a plain list of words


def keep_text(arguments: Iterable[str]) -> list[str]:
    """Arguments KEY=VALUE, in which Hydra reads the values of text keys and of groups as they are typed.

    Where a key takes text, what Hydra would read as a number or a truth value is quoted: `name=2024_11_05`
    stays 2024_11_05. So is what Hydra's grammar has no value for, as in `output=~/runs`. The names of a
    group's files are text too, and `null` becomes `none` there: Hydra has no null for a group. Lists of
    values (`name=1,2`, `choice(1,2)`) are treated value by value; what Hydra reads as text is unchanged.
    """
    return [_kept(argument) for argument in arguments]


def _kept(argument: str) -> str:
    key, sign, value = argument.partition("=")
    name = key.lstrip("+")
    if sign and name in GROUPS:
        return f"{key}={_each(value, _choice)}"
    if sign and name in TEXT_KEYS:
        return f"{key}={_each(value, _text)}"
    return argument


def _each(value: str, change: Callable[[str], str]) -> str:
    """Changes each of the comma-separated values."""
    if match := CHOICE.fullmatch(value):
        return f"{match[1]}{_each(match[2], change)}{match[3]}"
    if QUOTING.search(value):
        return value if _is_value(value) else _quoted(value)
    return ",".join(change(element) for element in value.split(","))


def _choice(element: str) -> str:
    return NONE if element.strip().lower() == "null" else _text(element)


def _text(element: str) -> str:
    return element if _is_value(element) else _quoted(element)


def _is_value(text: str) -> bool:
    """Whether Hydra reads this as a value, and as none that is a number or a truth value."""
    try:
        value = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return False
    return not isinstance(value, int | float)


def _quoted(text: str) -> str:
    return QuotedString(text.strip(), Quote.single).with_quotes()
