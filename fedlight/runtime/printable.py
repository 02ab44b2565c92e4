"""Text from untrusted sources and file names, escaped so that a terminal or a log shows it on one line."""

import re

LENGTH = 300  # characters
LONGEST = 100_000  # characters of an error message


def legible(name: str) -> str:
    """A file name with each byte that is not UTF-8 in hexadecimal; other text is unchanged."""
    return re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", name)


def printable(text: object, length: int = LENGTH) -> str:
    """An untrusted text on one line: control characters are escaped, and it is cut to `length` characters.

    Args:
        text: converted by `str` first.
        length: maximum number of characters of the result, at least 1.
    """
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)[: length + 1]
    )
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def plain_line(text: object, length: int = LONGEST) -> str:
    """An error message, which may quote untrusted text, on one line; white space becomes single spaces.

    Args:
        text: converted by `str` first.
        length: maximum number of characters of the result.
    """
    return printable(" ".join(str(text).split()), length)
