"""Overrides of the command line: text keys keep their text, and null leaves out an optional group."""

import re
from collections.abc import Callable, Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from fedlight.config import TEXT_KEYS

GROUPS = frozenset(
    ("aggregation", "algorithm", "data", "early_stopping", "evaluation", "experiment", "finetuning", "logger")
    + ("method", "model", "optimizer", "partition", "privacy", "sweeps", "trainer", "transform", "transport")
    + ("hydra/launcher", "hydra/sweeper")
)
NONE = "none"  # the file that leaves out an optional group
CHOICE = re.compile(r"(\s*(?:choice|shuffle|sort)\()(.*)(\)\s*)", re.DOTALL)
LOGGERS = re.compile(r"logger=\[\s*((?:\w+\s*(?:,\s*\w+\s*)*)?)\]")
QUOTING = re.compile(r"['\"\\()\[\]{}$]")  # in a value that is not a plain list of words


def keep_text(arguments: Iterable[str]) -> list[str]:
    """Quotes the values of text keys and of groups in arguments KEY=VALUE, so that Hydra reads them as typed.

    Where a key takes text, a value that Hydra would read as a number or a truth value is quoted:
    `name=2024_11_05` stays 2024_11_05. So is a value outside Hydra's grammar, such as `output=~/runs`. The
    names of a group's files are text too, and `null` becomes `none` there, since Hydra has no null for a
    group. Lists (`name=1,2`, `choice(1,2)`) are quoted value by value; what Hydra reads as text is unchanged.

    `logger=[NAME,NAME]` becomes a choice of the group for each, in a section of its own: `logger.NAME`.
    A name counts once, and `logger=[]` is none.
    """
    return [_keep_text(argument) for typed in arguments for argument in _split_loggers(typed)]


def _split_loggers(argument: str) -> list[str]:
    match = LOGGERS.fullmatch(argument)
    if match is None:
        return [argument]
    names = dict.fromkeys(name.strip() for name in match[1].split(","))
    return ["logger=none", *(f"+logger@logger.{name}={name}" for name in names if name)]


def _keep_text(argument: str) -> str:
    key, sign, value = argument.partition("=")
    name = key.lstrip("+")
    if sign and name in GROUPS:
        return f"{key}={_map_values(value, _keep_choice)}"
    if sign and name in TEXT_KEYS:
        return f"{key}={_map_values(value, _keep_element)}"
    return argument


def _map_values(value: str, change: Callable[[str], str]) -> str:
    """Applies a function to each of the comma-separated values."""
    if match := CHOICE.fullmatch(value):
        return f"{match[1]}{_map_values(match[2], change)}{match[3]}"
    if QUOTING.search(value):
        return value if _is_value(value) else _quote(value)
    return ",".join(change(element) for element in value.split(","))


def _keep_choice(element: str) -> str:
    return NONE if element.strip().lower() == "null" else _keep_element(element)


def _keep_element(element: str) -> str:
    return element if _is_value(element) else _quote(element)


def _is_value(text: str) -> bool:
    """Whether Hydra reads this as a value other than a number or a truth value."""
    try:
        value = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return False
    return not isinstance(value, int | float)


def _quote(text: str) -> str:
    return QuotedString(text.strip(), Quote.single).with_quotes()
