"""The first rounds of a cell, taken from a shorter finished cell instead of being trained again."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fedlight.config import CellConfig
from fedlight.experiment.early_stopping import find_stop
from fedlight.experiment.parts import CHECKPOINT
from fedlight.experiment.result import score_columns
from fedlight.experiment.sample_grid import grid_path
from fedlight.experiment.scored_models import is_evaluation_round
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.messages import State
from fedlight.federation.server import Server
from fedlight.federation.site import Site, client_memory
from fedlight.runs.csv_files import ROUND_COLUMNS
from fedlight.runs.reader import Count, FlopsEntry, ImageQuality, Number, PrivacyEntry
from fedlight.runtime.errors import Damaged
from fedlight.runtime.files import atomic
from fedlight.runtime.progress import track
from fedlight.runtime.untrusted import first_error

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of such a file


class _Row(BaseModel):
    """A row of `rounds.csv`, as the server stored it."""

    model_config = ConfigDict(extra="allow")

    round: Count
    train_loss: Number | None
    fid: Number | None
    seconds: Number


class _Round(BaseModel):
    """What the server stored of a round."""

    model_config = ConfigDict(extra="allow")

    row: _Row
    client_losses: dict[str, Number]
    fid: ImageQuality | None
    privacy: PrivacyEntry | None = None


class _History(BaseModel):
    """What the server stored of a cell."""

    rounds: list[_Round]
    seconds: dict[str, Number]
    flops: FlopsEntry | None = None


HISTORY = TypeAdapter(_History)


def take_beginning(
    shorter: Path, folder: Path, config: CellConfig, server: Server, checkpoint: ServerCheckpoint, site: Site
) -> int:
    """Stores the last state of a finished cell as that of a longer one, which goes on from it.

    The shorter cell is untrusted. The state of the server is stored last, so that after a kill the same is
    done again.

    Args:
        shorter: folder of the finished cell, whose configuration differs in its rounds alone.
        folder: of the longer cell.
        config: of the longer cell.
        server: of the longer cell; it is left in the state after the last round of the shorter one.
        checkpoint: of the longer cell.
        site: of the longer cell.

    Returns:
        The number of rounds that were taken, 0 where the longer cell has as many itself.

    Raises:
        Damaged: a file of the shorter cell is missing, damaged, or not of the schema.
    """
    stored = ServerCheckpoint(shorter / CHECKPOINT, shorter.name, repair=False)
    first = dict(server.state)
    history = server.resume(stored)
    if stored.damages or history is None:
        raise Damaged(stored.damages[0] if stored.damages else f"{shorter / CHECKPOINT} holds no server")
    if server.round <= checkpoint.last_round:
        return 0
    _check_history(shorter, history, server.round)
    _check_server(shorter, server, first, config.clients)
    rounds, seconds = history["rounds"], history["seconds"]
    rows = [entry["row"] for entry in rounds]
    if not _has_scores(config, rows):  # the last one of the shorter cell, and none of the longer one
        rounds[-1]["fid"] = None
        rows[-1].update(score_columns(None))

    memory = client_memory(shorter / CHECKPOINT, shorter.name, repair=False)
    clients = server.met.items() if site.setup.keeps_memory else ()
    for client, round_ in track(clients, f"{folder.name}: the clients' memory", len(clients)):
        kept = memory.read(client, round_)
        _check_memory(shorter, client, kept, site)
        site.memory.write(client, round_, kept, previous=0)
    for number, row in enumerate(rows, 1):
        if _has_scores(config, rows[:number]):
            _copy_picture(shorter, folder, row["round"])

    parent = {"cell": shorter.name, "sweep": shorter.absolute().parent.name, "rounds": server.round}
    parent["seconds"] = seconds["total"]
    spent = {"seconds": seconds, "flops": history.get("flops")}
    server.save(checkpoint, {"rounds": rounds, **spent, "parent": parent})
    return server.round


def _check_history(shorter: Path, history: dict[str, Any], last: int) -> None:
    """Raises Damaged where a server's history is not of the schema, or is not that of `last` rounds."""
    try:
        stored = HISTORY.validate_python(history)
        numbers = [entry.row.round for entry in stored.rounds]
        columns = {column for entry in history["rounds"] for column in entry["row"]}
        if numbers != list(range(1, last + 1)) or not columns <= set(ROUND_COLUMNS):
            raise ValueError(f"rows that are not those of rounds 1 to {last}")
        if "total" not in stored.seconds:
            raise ValueError("no seconds of total")
    except ValueError as error:
        reason = first_error(error) if isinstance(error, ValidationError) else error
        raise Damaged(f"{shorter / CHECKPOINT} holds no history of rounds: {reason}") from error


def _check_server(shorter: Path, server: Server, first: State, clients: int) -> None:
    """Raises Damaged where a stored server names clients it does not have, or its algorithm does not fit.

    Args:
        shorter: folder of its cell.
        server: as restored from the file.
        first: the state of its algorithm before the first round.
        clients: K.
    """
    if any(client >= clients or round_ > server.round for client, round_ in server.met.items()):
        raise Damaged(f"{shorter / CHECKPOINT} names clients or rounds that the cell does not have")
    for name, tensor in first.items():
        if name not in server.state or server.state[name].shape != tensor.shape:
            raise Damaged(f"{shorter / CHECKPOINT}: the state {name} of the algorithm does not fit the model")


def _has_scores(config: CellConfig, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a cell evaluates its models after the last of these rounds."""
    return is_evaluation_round(rows[-1]["round"], config) or bool(find_stop(config.early_stopping, rows))


def _check_memory(shorter: Path, client: int, memory: dict[str, State], site: Site) -> None:
    """Raises Damaged where the model in a client's memory does not fit the client model."""
    first = site.setup.first
    model = memory.get("model", {})
    fits = model.keys() == set(site.setup.private) and all(
        name in first and tensor.shape == first[name].shape
        for group in ("model", "reference", "errors")
        for name, tensor in memory.get(group, {}).items()
    )
    if not fits:
        raise Damaged(f"{shorter}: the stored memory of client {client} does not fit the model of the cell")


def _copy_picture(shorter: Path, folder: Path, round_: int) -> None:
    """Copies the generated images of a round, if there are any."""
    source, target = grid_path(shorter, round_), grid_path(folder, round_)
    if target.exists() or source.is_symlink() or not source.is_file():
        return
    with source.open("rb") as file:
        if file.read(len(PNG)) != PNG:
            return
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary, follow_symlinks=False)
