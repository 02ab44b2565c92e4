"""Text from elsewhere, made fit for a line of a log."""

import re

LENGTH = 300  # characters
LONGEST = 100_000  # characters of an error message


def printable(text: object, length: int = LENGTH) -> str:
    """A text on one line: control characters are escaped, and what exceeds `length` characters is cut.

    Args:
        text: whatever `str` takes, from a party that nobody vouches for.
        length: the largest number of characters of the result, 1 or more.
    """
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)[: length + 1]
    )
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def plain_line(text: str) -> str:
    """An error message, which may hold text from elsewhere, on one line; white space is a space."""
    return printable(" ".join(text.split()), LONGEST)


def legible(name: str) -> str:
    """Text with each byte of a file name that is not UTF-8 in hexadecimal; other text stays as it is."""
    return re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", name)
