"""The plan of a sweep, written before its first cell starts: one file for each command, in `.plan/`."""

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue, StringConstraints

from fedlight.runtime.files import atomic
from fedlight.runtime.process_record import Job, Number, ProcessRecord, Text
from fedlight.runtime.untrusted import Strict

PLAN = ".plan"
LISTED = "FEDLIGHT_LISTED_ONLY"
"""Environment variable: a sweep's folder; its cells must lie there and call only what fedlight lists."""
LARGEST = 2**26  # bytes of a plan; a cell has about 2**10
MOST = 100_000  # cells of a plan, and arguments of a command
CellId = Annotated[str, StringConstraints(pattern=r"^[\w+][\w.+-]*$", max_length=255)]


@dataclass
class PlannedCell:
    """A cell of a command.

    Attributes:
        overrides: of the configuration, as typed after `python -m fedlight.run`.
        rounds: number of rounds, R.
        job: the latest SLURM job that was submitted for it, or None.
        config: its configuration by dotted keys; empty in a plan of an earlier version.
    """

    overrides: list[str]
    rounds: int
    job: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Launch:
    """One command that launched a sweep; typing the same command again replaces it.

    Attributes:
        command: arguments of `python -m fedlight.run`.
        folder: its working folder.
        process: the launching process.
        cells: cells by id, in the order of the grid.
    """

    command: list[str]
    folder: str
    process: ProcessRecord
    cells: dict[str, PlannedCell] = field(default_factory=dict)

    @property
    def command_line(self) -> str:
        return f"python -m fedlight.run {shlex.join(self.command)}".rstrip()

    def write(self, sweep: Path) -> None:
        """Writes the file of this launch; values that all configurations share are written once."""
        content = asdict(self)
        configs = [cell["config"] for cell in content["cells"].values()]
        content["shared"] = shared = {
            key: value
            for key, value in (configs[0] if configs else {}).items()
            if all(key in config and repr(config[key]) == repr(value) for config in configs)
        }
        for cell in content["cells"].values():
            cell["config"] = {key: value for key, value in cell["config"].items() if key not in shared}
        path = _path(sweep, self.command, self.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class _PlannedCell(Strict):
    overrides: Annotated[list[Text], Field(max_length=MOST)]
    rounds: Number
    job: Job | None = None
    config: dict[Text, JsonValue] = Field(default={})


class _PlanFile(Strict):
    """Schema of a file of `.plan/`, which is untrusted."""

    command: Annotated[list[Text], Field(max_length=MOST)]
    folder: Text
    process: ProcessRecord
    cells: dict[CellId, _PlannedCell] = Field(default={}, max_length=MOST)
    shared: dict[Text, JsonValue] = Field(default={})


def read_launches(sweep: Path) -> list[Launch]:
    """The launches of a sweep in the order of their start."""
    files = (sweep / PLAN).glob("[!.]*.json")
    launches = [launch for path in files if (launch := _read(path))]
    return sorted(launches, key=lambda launch: launch.process.since)


def read_launch(sweep: Path, command: list[str], folder: str) -> Launch | None:
    """The launch of a command in a working folder; None if there is none."""
    return _read(_path(sweep, command, folder))


def read_last_jobs(sweep: Path) -> dict[str, str]:
    """The latest SLURM job of each cell by cell id."""
    return {
        cell: planned.job
        for launch in read_launches(sweep)
        for cell, planned in launch.cells.items()
        if planned.job is not None
    }


def _path(sweep: Path, command: list[str], folder: str) -> Path:
    key = json.dumps([folder, command])
    return sweep / PLAN / f"{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}.json"


def _read(path: Path) -> Launch | None:
    """The launch in a file; None if it is no valid plan, or is missing."""
    try:
        with path.open("rb") as file:
            plan = _PlanFile.model_validate_json(file.read(LARGEST))
    except (OSError, ValueError):
        return None
    cells = {
        name: PlannedCell(cell.overrides, cell.rounds, cell.job, plan.shared | cell.config)
        for name, cell in plan.cells.items()
    }
    return Launch(plan.command, plan.folder, plan.process, cells)
