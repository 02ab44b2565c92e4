"""What a sweep is to run, written before its first cell starts: one file a command, in `.plan/`."""

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from fedlight.runtime.files import atomic
from fedlight.runtime.process_record import Job, Number, ProcessRecord, Text

PLAN = ".plan"
LISTED = "FEDLIGHT_LISTED_ONLY"
"""Environment variable: a sweep's folder; its cells must lie there and call only what fedlight lists."""
LARGEST = 2**26  # bytes of a plan; a cell has about 2**10
MOST = 100_000  # cells of a plan, and arguments of a command
CellId = Annotated[str, StringConstraints(pattern=r"^[\w+][\w.+-]*$", max_length=255)]


@dataclass
class PlannedCell:
    """A cell that a command asked for.

    Attributes:
        overrides: of the configuration, as typed after `python -m fedlight.run`.
        rounds: R.
        job: the SLURM job that last was to run it, or None.
        config: its configuration by dotted keys; empty in a plan of an earlier version.
    """

    overrides: list[str]
    rounds: int
    job: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Launch:
    """One command that launched a sweep; the same command again takes its place.

    Attributes:
        command: what was typed after `python -m fedlight.run`.
        folder: where it was typed.
        process: the launching process.
        cells: cell id: cell, in the order of the grid.
    """

    command: list[str]
    folder: str
    process: ProcessRecord
    cells: dict[str, PlannedCell] = field(default_factory=dict)

    @property
    def command_line(self) -> str:
        return f"python -m fedlight.run {shlex.join(self.command)}".rstrip()

    def write(self, sweep: Path) -> None:
        """Writes the file of this launch; what the configurations of all cells share is written once."""
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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _PlannedCell(_Strict):
    overrides: Annotated[list[Text], Field(max_length=MOST)]
    rounds: Number
    job: Job | None = None
    config: dict[Text, JsonValue] = {}


class _PlanFile(_Strict):
    """What a file of `.plan/` holds, which may come from elsewhere."""

    command: Annotated[list[Text], Field(max_length=MOST)]
    folder: Text
    process: ProcessRecord
    cells: Annotated[dict[CellId, _PlannedCell], Field(max_length=MOST)] = {}
    shared: dict[Text, JsonValue] = {}


def read_launches(sweep: Path) -> list[Launch]:
    """The launches of a sweep, the latest last."""
    files = (sweep / PLAN).glob("[!.]*.json")
    launches = [launch for path in files if (launch := _read(path))]
    return sorted(launches, key=lambda launch: launch.process.since)


def read_launch(sweep: Path, command: list[str], folder: str) -> Launch | None:
    """The launch of that command, typed in that folder."""
    return _read(_path(sweep, command, folder))


def last_jobs(sweep: Path) -> dict[str, str]:
    """Cell id: the SLURM job that last was to run it."""
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
    """None for a file that is not ours, or was taken away meanwhile."""
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
