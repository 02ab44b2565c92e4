"""Reads a cell's folder for `fedlight.sweeps status`, the table in the terminal and the report."""

import csv
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedlight.runs.identity import SCHEMA, read_result
from fedlight.runtime.lease import HOLDER
from fedlight.runtime.untrusted import first_error, read_yaml

CELL_FILES = ("config.yaml", "result.json", "rounds.csv", HOLDER)
"""A folder that has one of these files is the folder of a cell."""

Content = TypeVar("Content")

LARGEST = 1e100  # largest number that a figure can show

Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
PrivacyBound: TypeAlias = Annotated[float, Field(ge=0, le=math.inf)]
"""An epsilon, noise or clip; `inf` means no bound."""


class ExchangeTotals(BaseModel):
    """Traffic of all rounds in both directions; `reduction` is the share saved against FULL, 0..1."""

    params_total: Count
    bytes_total: Count
    reduction: Number | None = None


class Coverage(BaseModel):
    """Share of the classes, 0..1, that occur among generated images, and entropy of the classes in nats."""

    share: Number
    entropy: Number


class LabelAccuracy(BaseModel):
    """Shares of images, 0..1, that match their label: of all classes, of seen (`held`) and unseen classes."""

    all: Number
    held: Number | None = None
    unseen: Number | None = None


class DownstreamAccuracy(BaseModel):
    """Test accuracies, 0..1, of classifiers trained on generated, on a client's own, on all real images."""

    generated: Number
    own: Number | None = None
    all: Number | None = None


class OwnQuality(BaseModel):
    """FID of clients' models against real images of each client's seen classes; lower is better."""

    value: Number | None
    per_client: list[Number | None]


class BootstrapInterval(BaseModel):
    """The 95 % interval of a cell's FID over the images that are drawn from its models."""

    low: Number
    high: Number


class ImageQuality(BaseModel):
    """Image quality with one feature extractor; lower `value` (FID) and `kid` are better."""

    extractor: str
    scope: str
    value: Number
    std: Number | None = None
    per_client: list[Number] | None = None
    clients: list[Count] | None = None
    extractor_accuracy: Number | None = None
    extractor_sha256: str | None = None
    kid: Number | None = None
    precision: Number | None = None
    recall: Number | None = None
    inception_score: Number | None = None
    coverage: Coverage | None = None
    own: OwnQuality | None = None
    label_accuracy: LabelAccuracy | None = None
    bootstrap: BootstrapInterval | None = None
    density: Number | None = None
    coverage_knn: Number | None = None
    downstream_accuracy: DownstreamAccuracy | None = None

    @model_validator(mode="after")
    def _check_clients(self) -> "ImageQuality":
        if self.clients and len(self.clients) != len(self.per_client or ()):
            raise ValueError(f"per_client must hold a number for each of {len(self.clients)} clients")
        return self


class PrivacyEntry(BaseModel):
    """The guarantee of a cell: (epsilon, delta) differential privacy of one client or of one image."""

    kind: str
    epsilon: PrivacyBound
    delta: Number
    noise: PrivacyBound
    clip: PrivacyBound


class MemoryEntry(BaseModel):
    """Sums of the peaks of all processes of a cell, in MB: resident memory, and memory on GPUs."""

    peak_mb: Number | None = None
    gpu_peak_mb: Number | None = None


class FlopsEntry(BaseModel):
    """Floating-point operations of a cell."""

    training: Number
    sampling: Number
    total: Number


class EarlyStop(BaseModel):
    """The round, before the last one, after which a cell was stopped, and why."""

    round: Count
    reason: str


class Result(BaseModel):
    """The part of `result.json` that status and report use."""

    model_config = ConfigDict(populate_by_name=True)

    version: int = Field(alias="schema", ge=SCHEMA, le=SCHEMA)
    status: str
    rounds: Count
    seed: Count
    exchange: ExchangeTotals
    train_loss: Number | None
    fid: ImageQuality | None
    privacy: PrivacyEntry | None = None
    seconds: dict[str, Number]
    memory: MemoryEntry | None = None
    flops: FlopsEntry | None = None
    versions: dict[str, str]
    machine: dict[str, Any] = {}
    error: str | None = None
    stopped: EarlyStop | None = None

    def quality(self, name: str) -> float | None:
        """A number of the image quality, such as `kid` or `coverage.share`; None if it is missing."""
        value: Any = self.fid
        for part in name.split("."):
            value = getattr(value, part) if value else None
        return value

    @property
    def scored_clients(self) -> int | None:
        """Number of clients whose models were evaluated; None if the federated model was."""
        return len(self.fid.clients) if self.fid and self.fid.clients else None


class StoredAttack(BaseModel):
    """An attack of `audit.json`; AUC and rates are given with the bounds of their 95 % intervals."""

    sees: str
    attack: str
    auc: tuple[Number, Number, Number]
    tpr_at_1_percent: Annotated[tuple[Number, Number, Number], Field(alias="tpr_at_0.01")]
    tpr_at_1_permille: Annotated[tuple[Number, Number, Number], Field(alias="tpr_at_0.001")]
    epsilon_lower: Number
    roc: list[tuple[Number, Number]]


class StoredAudit(BaseModel):
    """The part of `audit.json` that the report uses."""

    attacks: list[StoredAttack] = []


NAMED: dict[str, TypeAdapter[Any]] = {
    "method.name": TypeAdapter(str),
    "data.name": TypeAdapter(str),
    "partition.name": TypeAdapter(str),
    "clients": TypeAdapter(Count),
    "rounds": TypeAdapter(Count),
    "seed": TypeAdapter(Count),
}
"""Keys of the configuration by which cells are sorted, and the types of their values."""


class CellFiles:
    """The files of a cell; each is validated when it is first used.

    A file that is missing or damaged counts as empty and does not affect the others.

    Args:
        folder: of the cell; it may be missing.
        planned: the planned configuration by dotted keys, used if `config.yaml` is missing.

    Attributes:
        problems: messages on damaged files by file name.
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
        return self._read("config.yaml", _config, self._planned)

    @cached_property
    def rounds(self) -> list[dict[str, float | None]]:
        """The rows of `rounds.csv`; an empty field is None."""
        return self._read("rounds.csv", _number_rows, [])

    @cached_property
    def partition(self) -> list[tuple[int, str, int]]:
        """The rows of `partition.csv`: client, label, number of images."""
        return self._read("partition.csv", _partition_rows, [])

    @cached_property
    def audit(self) -> StoredAudit:
        """The results of the attacks in `audit.json`."""
        return self._read(
            "audit.json", lambda path: StoredAudit.model_validate_json(path.read_bytes()), StoredAudit()
        )

    def report(self, name: str, error: Exception) -> None:
        """Adds a file that cannot be read to `problems`."""
        self.problems[name] = f"{name} cannot be read: {_one_line(error)}"

    def check(self) -> list[str]:
        """Reads `result.json`, `config.yaml` and `rounds.csv`; returns the messages on damaged files."""
        for content in ("result", "config", "rounds"):
            getattr(self, content)
        return list(self.problems.values())

    def modified(self, name: str) -> float:
        """Modification time of a file in seconds since 1970; 0 if it is missing."""
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
            self.report(name, error)
            return empty


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested configuration to dotted keys.

    Raises:
        ValueError: it is no mapping.
    """
    if not isinstance(node, dict):
        raise ValueError("no mapping")
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _config(path: Path) -> dict[str, Any]:
    config = flatten(read_yaml(path))
    for key, kind in NAMED.items():
        if key in config:
            try:
                config[key] = kind.validate_python(config[key])
            except ValidationError as error:
                raise ValueError(f"{key}: {error.errors()[0]['msg']}") from error
    return config


def _number_rows(path: Path) -> list[dict[str, float | None]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: _number(key, value) for key, value in row.items()} for row in rows]


def _number(key: str, text: str | None) -> float | None:
    if not text:
        if key == "round":
            raise ValueError("a row has no round")
        return None
    value = float(text)
    if not (abs(value) <= LARGEST or (key == "epsilon" and value == math.inf)):
        raise ValueError(f"{key} is {text}")
    return value


def _partition_rows(path: Path) -> list[tuple[int, str, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["client"]), row["label"], int(row["count"])) for row in csv.DictReader(file)]
    if not all(0 <= client < 2**31 and label is not None and 0 <= n < 2**63 for client, label, n in rows):
        raise ValueError("a row does not hold client, label and number of images")
    if len({row[:2] for row in rows}) < len(rows):
        raise ValueError("a client has two rows for one label")
    return rows


def _one_line(error: Exception) -> str:
    return first_error(error) if isinstance(error, ValidationError) else " ".join(str(error).split())


def read_numbers(folder: Path) -> dict[str, float] | None:
    """Reads the numbers of a cell's result by dotted keys; None if the cell is not completed."""
    result = read_result(folder)
    if result is None or result.get("status") != "completed":
        return None
    return dict(_numbers(result))


def _numbers(node: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a result by their dotted keys."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _numbers(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield key, float(node)
