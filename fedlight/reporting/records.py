"""What the report reads of a cell: the files that it left, whole or not."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlight.runs.identity import SCHEMA
from fedlight.runtime.errors import BadInput

TRACES = ("config.yaml", "result.json", "rounds.csv")
"""Files that make a folder a cell's."""

CURVES = ("round", "train_loss", "params_cumulative", "bytes_cumulative", "fid")
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times the speed, where it was compiled


class Exchange(BaseModel):
    """What crossed in all rounds, both ways; `reduction` is the share that FULL would have had more, 0..1."""

    params_total: int
    bytes_total: int
    reduction: float | None = None


class Score(BaseModel):
    """Image quality as one extractor sees it; lower `value` (FID) and `kid` are better."""

    extractor: str
    scope: str
    value: float
    std: float | None = None
    per_client: list[float] | None = None
    clients: list[int] | None = None
    extractor_accuracy: float | None = None
    extractor_sha256: str | None = None
    samples: int | None = None
    sampler: str | None = None
    steps: int | None = None
    reference: str | None = None
    kid: float | None = None
    precision: float | None = None
    recall: float | None = None
    inception_score: float | None = None


class Result(BaseModel):
    """`result.json`, as far as the report depends on it."""

    model_config = ConfigDict(populate_by_name=True)

    version: int = Field(alias="schema", ge=SCHEMA, le=SCHEMA)
    status: str
    method: str
    clients: int
    rounds: int
    seed: int
    data: str
    partition: str
    model: str
    exchange: Exchange
    train_loss: float | None
    fid: Score | None
    seconds: dict[str, float]
    versions: dict[str, str]
    machine: dict[str, Any] = {}
    error: str | None = None

    def quality(self, name: str) -> float | None:
        """A number of the score, None where the cell was not scored."""
        return getattr(self.fid, name) if self.fid else None


@dataclass
class Record:
    """A cell's folder, read.

    Attributes:
        status: that of `result.json`; `unfinished` where there is none, `corrupt` where it cannot be read.
        note: what went wrong, or how far an unfinished cell has come.
        config: `config.yaml` by dotted keys; empty where it cannot be read.
        rounds: the columns `CURVES` of `rounds.csv`; no row where it cannot be read.
    """

    folder: Path
    status: str
    note: str = ""
    result: Result | None = None
    config: dict[str, Any] = field(default_factory=dict)
    rounds: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(CURVES)))

    @property
    def sweep(self) -> str:
        return self.folder.parent.name


def read_sweeps(sweeps: list[Path]) -> list[Record]:
    """Every cell of the given folders, once; a completed one is preferred to its double.

    Raises:
        BadInput: a folder is not there, or none of them holds a cell.
    """
    records: dict[str, Record] = {}
    for sweep in sweeps:
        if not sweep.is_dir():
            raise BadInput(f"{sweep}: no such folder; a sweep is a folder like runs/NAME")
        for folder in sorted(sweep.iterdir()):
            if any((folder / trace).is_file() for trace in TRACES):
                record = read_cell(folder)
                double = records.get(folder.name)
                if double is None or (record.status == "completed" != double.status):
                    records[folder.name] = record
    if not records:
        folders = ", ".join(map(str, sweeps))
        raise BadInput(f"{folders}: no cell here; python -m fedlight.run name=NAME puts cells into runs/NAME")
    return list(records.values())


def read_cell(folder: Path) -> Record:
    """Reads what a cell left; what cannot be read is told in the record's `note`."""
    notes: list[str] = []
    record = Record(folder, "unfinished")
    try:
        record.config = flat(yaml.load((folder / "config.yaml").read_text(), YAML_LOADER))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"config.yaml cannot be read: {_line(error)}")
    try:
        record.rounds = pd.read_csv(folder / "rounds.csv", dtype=float)[list(CURVES)]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        notes.append(f"rounds.csv cannot be read: {_line(error)}")
    try:
        record.result = Result.model_validate_json((folder / "result.json").read_bytes())
        record.status = record.result.status
        notes.insert(0, record.result.error or "")
    except FileNotFoundError:
        notes.insert(0, _progress(folder, record))
    except (OSError, ValidationError) as error:
        record.status = "corrupt"
        notes.insert(0, f"result.json cannot be read: {_line(error)}")
    record.note = "; ".join(note for note in notes if note)
    return record


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


def _progress(folder: Path, record: Record) -> str:
    seen = max(path.stat().st_mtime for path in folder.iterdir() if path.is_file())
    when = datetime.fromtimestamp(seen).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    planned = record.config.get("rounds", "?")
    return f"running or killed: {len(record.rounds)} of {planned} rounds done, last sign of life {when}"


def _line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
    return " ".join(str(error).split())
