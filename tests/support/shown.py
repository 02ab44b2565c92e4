"""The blocks of code that README and docs show, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_RUN = "Not run by a test"
"""The title of a shell block begins so where no test checks its commands; the rest of the title says why."""
ERROR = "console"
"""The language of a block with a command, after `$ `, and the error that it gives."""
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; `place` is PAGE:LINE of its fence."""

    place: str
    language: str
    title: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a shell block: the variables before it, and its words."""

    place: str
    variables: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def verb(self) -> str | None:
        """The verb of fedlight that it calls, in either spelling; None for another program."""
        if self.words[0] == "fedlight":
            return self.words[1]
        if self.words[:2] == ("python", "-m") and self.words[2].startswith("fedlight."):
            return self.words[2].removeprefix("fedlight.")
        return None

    @property
    def arguments(self) -> list[str]:
        """The words after the verb of fedlight."""
        return list(self.words[2 if self.words[0] == "fedlight" else 3 :])


def pages() -> list[Path]:
    """README, CONTRIBUTING and all pages of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page that name a language."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(f"{page.relative_to(ROOT)}:{line}", match[1], match[2] or "", match[3])


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block, without comments; lines that end in a backslash go on."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
        if words[count:]:
            yield Command(block.place, tuple(words[:count]), tuple(words[count:]))


def checked_commands(page: Path) -> list[Command]:
    """The commands of the shell blocks of a page that are not marked as not run."""
    return [
        command
        for block in blocks(page)
        if block.language == "sh" and not block.title.startswith(NOT_RUN)
        for command in commands(block)
    ]
