"""Text in pictures is drawn literally: $, _, ^ and backslashes in names are no markup."""

from typing import Any

from matplotlib import rc_context

LITERAL: dict[Any, Any] = {"text.parse_math": False}

literal_text = rc_context(LITERAL)
"""Decorates a function that makes a figure and draws it."""
