"""An institution's record of its answers: which round was answered, to which message, with which bytes.

`answers.json` names each answer: the SHA-256 of the message that it answers, and of its own bytes. The record
is on the disk before an answer leaves, so that a process that is killed cannot give a round a second answer.
The bytes of the last answers lie beside it, in `answers/`, so that a repeated message gets the same bytes.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlight.runtime.errors import Damaged
from fedlight.runtime.files import atomic, naming

KEPT = 2  # rounds whose bytes are kept; a server that restarts goes back by at most one round


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        request: SHA-256 of the message that it answers.
        sha256: of its own bytes.
    """

    request: str
    sha256: str


class Answers:
    """The record of one institution in one federation.

    Args:
        folder: of its memory; `answers.json` and `answers/` lie there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "answers.json"

    @contextmanager
    def opened(self) -> Iterator["Answers"]:
        """Reads the record, and locks it against other processes meanwhile.

        Raises:
            Damaged: the record cannot be read.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._folder / "answers.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._rounds = self._read()
            yield self

    @property
    def last(self) -> int:
        """The last round for which an update was given; 0 for none."""
        return max((round_ for round_, kinds in self._rounds.items() if "update" in kinds), default=0)

    def count(self, kind: str, round_: int) -> int:
        """The number of answers of a kind that were given in a round."""
        return len(self._given(kind, round_))

    def repeat(self, kind: str, round_: int, request: bytes) -> bytes | None:
        """The bytes that were given before to this message; None where it is new.

        Raises:
            Damaged: they are missing, or were changed.
        """
        digest = sha256(request)
        for answer in self._given(kind, round_):
            if answer.request == digest:
                return self._read_bytes(answer)
        return None

    def add(self, kind: str, round_: int, request: bytes, content: bytes) -> bytes:
        """Stores an answer and returns its bytes, which may leave only after this."""
        answer = Answer(sha256(request), sha256(content))
        path = self._path_of(answer)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_bytes(content)
        self._rounds.setdefault(round_, {}).setdefault(kind, []).append(answer)
        with atomic(self._path) as temporary:
            temporary.write_text(json.dumps(self._rounds, default=vars, indent=1) + "\n", encoding="utf-8")
        self._remove_old()
        return content

    def _given(self, kind: str, round_: int) -> list[Answer]:
        return self._rounds.get(round_, {}).get(kind, [])

    def _read_bytes(self, answer: Answer) -> bytes:
        path = self._path_of(answer)
        try:
            with naming(path):
                content = path.read_bytes()
        except FileNotFoundError as error:
            raise Damaged(f"{path} is missing, and nothing leaves in its place: restore it") from error
        if sha256(content) != answer.sha256:
            raise Damaged(f"{path} is damaged, and nothing leaves in its place: restore it")
        return content

    def _path_of(self, answer: Answer) -> Path:
        return self._folder / "answers" / f"{answer.sha256}.safetensors"

    def _read(self) -> dict[int, dict[str, list[Answer]]]:
        try:
            with naming(self._path):
                record = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                int(round_): {
                    kind: [Answer(**answer) for answer in answers] for kind, answers in kinds.items()
                }
                for round_, kinds in record.items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            raise Damaged(f"{self._path} is damaged, and without it nothing leaves: restore it") from error

    def _remove_old(self) -> None:
        """Removes the bytes of rounds to which no server goes back."""
        newest = max(self._rounds)
        kept = {
            self._path_of(answer)
            for round_, kinds in self._rounds.items()
            if round_ > newest - KEPT
            for answers in kinds.values()
            for answer in answers
        }
        for path in self._path_of(Answer("", "")).parent.glob("*.safetensors"):
            if path not in kept:
                path.unlink(missing_ok=True)


def sha256(content: bytes) -> str:
    """SHA-256 of a message's bytes, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
