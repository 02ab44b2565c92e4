"""The reader of a cell's folder: for `fedlight.sweeps status`, the table in the terminal and the report."""

import csv
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlight.runs.identity import SCHEMA
from fedlight.runtime.lock import HOLDER
from fedlight.runtime.plain_yaml import read_yaml

CELL_FILES = ("config.yaml", "result.json", "rounds.csv", HOLDER)
"""A folder that has one of these files is the folder of a cell."""

Content = TypeVar("Content")


class ExchangeTotals(BaseModel):
    """What crossed in all rounds, both ways; `reduction` is the share that FULL would have had more, 0..1."""

    params_total: int
    bytes_total: int
    reduction: float | None = None


class Coverage(BaseModel):
    """The share, 0..1, of the classes that turn up among generated images, and their entropy in nats."""

    share: float
    entropy: float


class LabelAccuracy(BaseModel):
    """Shares, 0..1, of images with the label asked for: of all classes, of held and of never seen ones."""

    all: float
    held: float | None = None
    unseen: float | None = None


class OwnQuality(BaseModel):
    """FID of clients' models against real images of the classes that each client holds; lower is better."""

    value: float | None
    per_client: list[float | None]


class ImageQuality(BaseModel):
    """Image quality as one extractor sees it; lower `value` (FID) and `kid` are better."""

    extractor: str
    scope: str
    value: float
    std: float | None = None
    per_client: list[float] | None = None
    clients: list[int] | None = None
    extractor_accuracy: float | None = None
    extractor_sha256: str | None = None
    kid: float | None = None
    precision: float | None = None
    recall: float | None = None
    inception_score: float | None = None
    coverage: Coverage | None = None
    own: OwnQuality | None = None
    label_accuracy: LabelAccuracy | None = None


class Result(BaseModel):
    """`result.json`, as far as status and report depend on it."""

    model_config = ConfigDict(populate_by_name=True)

    version: int = Field(alias="schema", ge=SCHEMA, le=SCHEMA)
    status: str
    rounds: int
    seed: int
    exchange: ExchangeTotals
    train_loss: float | None
    fid: ImageQuality | None
    privacy: dict[str, Any] | None = None
    seconds: dict[str, float]
    versions: dict[str, str]
    machine: dict[str, Any] = {}
    error: str | None = None

    def quality(self, name: str) -> float | None:
        """A number of the image quality, such as `kid` or `coverage.share`; None where the cell has none."""
        found: Any = self.fid
        for part in name.split("."):
            found = getattr(found, part) if found else None
        return found

    @property
    def scored_clients(self) -> int | None:
        """How many clients' models were scored, None where it was not theirs."""
        return len(self.fid.clients) if self.fid and self.fid.clients else None


class CellFiles:
    """The files of a cell; each is read when it is first asked for.

    A file that is missing or cannot be read counts as empty.

    Args:
        folder: of the cell; it may be missing.
        planned: the planned configuration by dotted keys; it stands in for a missing `config.yaml`.

    Attributes:
        problems: name of a file that was found damaged so far: a message that says why.
    """

    def __init__(self, folder: Path, planned: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.problems: dict[str, str] = {}
        self._planned = planned or {}

    @cached_property
    def result(self) -> Result | None:
        return self._read("result.json", lambda path: Result.model_validate_json(path.read_bytes()), None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.yaml` by dotted keys."""
        return self._read("config.yaml", lambda path: flat(read_yaml(path)), self._planned)

    @cached_property
    def rounds(self) -> list[dict[str, float | None]]:
        """The rows of `rounds.csv`; an empty field is None."""
        return self._read("rounds.csv", _number_rows, [])

    @cached_property
    def partition(self) -> list[tuple[int, str, int]]:
        """The rows of `partition.csv`: client, label, number of images."""
        return self._read("partition.csv", _partition_rows, [])

    @cached_property
    def audit(self) -> dict[str, Any]:
        """`audit.json`, what an attacker found."""
        return self._read("audit.json", lambda path: dict(json.loads(path.read_bytes())), {})

    def check(self) -> list[str]:
        """Reads `result.json`, `config.yaml` and `rounds.csv`; returns the messages on damaged files."""
        for content in ("result", "config", "rounds"):
            getattr(self, content)
        return list(self.problems.values())

    def modified(self, name: str) -> float:
        """When a file was last written, in seconds since 1970; 0 where it is missing."""
        try:
            return (self.folder / name).stat().st_mtime
        except OSError:
            return 0.0

    def _read(self, name: str, parse: Callable[[Path], Content], empty: Content) -> Content:
        try:
            return parse(self.folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return empty
        except (OSError, ValueError, TypeError, KeyError, RecursionError, csv.Error) as error:
            self.problems[name] = f"{name} cannot be read: {_one_line(error)}"
            return empty


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration by dotted keys.

    Raises:
        ValueError: it is no mapping.
    """
    if not isinstance(node, dict):
        raise ValueError("no mapping")
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _number_rows(path: Path) -> list[dict[str, float | None]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) if value else None for key, value in row.items()} for row in rows]


def _partition_rows(path: Path) -> list[tuple[int, str, int]]:
    with path.open(newline="") as file:
        return [(int(row["client"]), row["label"], int(row["count"])) for row in csv.DictReader(file)]


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
    return " ".join(str(error).split())
