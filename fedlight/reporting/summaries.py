"""The tables of a board: FID by method, methods in full, cell by cell."""

from collections.abc import Callable
from typing import NamedTuple

from fedlight.reporting import numbers
from fedlight.reporting.comparison import Board, Entry, Place
from fedlight.reporting.records import Result
from fedlight.reporting.tables import Field, Table

Value = float | int | str | None


class Quantity(NamedTuple):
    """A number of a cell: head of its column, key in the CSV, how it is read and printed."""

    head: str
    key: str
    read: Callable[[Result], float | None]
    text: Callable[[float | None], str]


SCORES = (
    Quantity("KID", "kid", lambda result: result.quality("kid"), numbers.score),
    Quantity("precision", "precision", lambda result: result.quality("precision"), numbers.share),
    Quantity("recall", "recall", lambda result: result.quality("recall"), numbers.share),
    Quantity("IS", "inception_score", lambda result: result.quality("inception_score"), numbers.score),
)
COSTS = (
    Quantity("parameters", "params", lambda result: result.exchange.params_total, numbers.count),
    Quantity("exchanged", "bytes", lambda result: result.exchange.bytes_total, numbers.data_volume),
    Quantity("vs FULL", "reduction", lambda result: result.exchange.reduction, numbers.saved),
    Quantity("loss", "train_loss", lambda result: result.train_loss, numbers.loss),
    Quantity("time", "seconds", lambda result: result.seconds.get("total"), numbers.seconds),
)


def summaries(board: Board, prefix: str) -> list[Table]:
    """The tables of a board; names of files begin with `prefix`."""
    made = [by_method(board, prefix)] if board.scored else []
    return [*made, in_full(board, prefix)]


def by_method(board: Board, prefix: str) -> Table:
    """FID by place and method, the best federated method of each row marked."""
    rows, data = [], []
    for place in board.places:
        best = board.best(place)
        entries = board.in_place(place)
        fields = {entry.method: _fid(entry, entry.method == best) for entry in entries}
        blank = Field(numbers.NONE, None)
        rows.append([*_place(board, place), *(fields.get(method, blank) for method in board.methods)])
        data.append(place._asdict() | {entry.method: entry.fid for entry in entries})
    judged = [
        f"{', '.join(methods)}: {how}"
        for scope, how in (("global", "the global model"), ("clients", "mean over the clients' own models"))
        if (methods := [m for m in board.methods if scope in board.scopes(m)])
    ]
    note = (
        "Lower is better; the best federated method of each row is marked. "
        f"What is judged: {'; '.join(judged)}. "
        "± is the standard deviation over seeds or, where there is one seed, over clients."
    )
    heads = _place_heads(board)
    columns = [*heads, *board.methods]
    return Table(f"{prefix}fid", "FID by method", note, columns, {*columns} - {*heads[:-1]}, rows, data)


def in_full(board: Board, prefix: str) -> Table:
    """A row for each method in its place: quality, exchange, loss and time."""
    quantities = [*_found(board), *COSTS]
    rows, data = [], []
    for place in board.places:
        best = board.best(place)
        for entry in board.in_place(place):
            if entry.everywhere:
                continue
            means: dict[str, float | None] = {q.key: entry.mean(q.read) for q in quantities}
            spread, over = entry.spread
            marked = entry.method == best
            fields = [Field(q.text(means[q.key]), means[q.key]) for q in quantities]
            quality = [_fid(entry, marked), Field(over, over)] if board.scored else []
            head = [*_place(board, place), Field(entry.method, entry.method)]
            rows.append([*head, *quality, *fields, Field(entry.status, entry.status)])
            scores: dict[str, Value] = {"fid": entry.fid, "fid_std": spread, "fid_std_over": over}
            scores["best"] = marked
            data.append(
                {"data": board.data, "extractor": board.extractor}
                | place._asdict()
                | {"method": entry.method, **(scores if board.scored else {}), **means}
                | {"status": entry.status}
            )
    heads = [*_place_heads(board), "method"]
    numeric = {"clients", "FID", *(q.head for q in quantities)}
    return Table(
        f"{prefix}table",
        "Methods in full",
        "Means over seeds. Exchange counts both ways, all rounds and clients; vs FULL: what FULL "
        "exchanges with the same participants and reports.",
        [*heads, *(("FID", "± over") if board.scored else ()), *(q.head for q in quantities), "status"],
        numeric,
        rows,
        data,
    )


def by_cell(board: Board, prefix: str) -> Table:
    """A row for each cell that was found, with its own numbers."""
    quantities = [*_found(board), *COSTS]
    rows, data = [], []
    for record in board.records:
        result, seed = record.result, record.config.get("seed")
        values = {q.key: q.read(result) if result else None for q in quantities}
        fid, std = (result.quality("value"), result.quality("std")) if result else (None, None)
        head = [record.sweep, record.folder.name, record.status]
        quality = [Field(numbers.score(fid, std), fid)] if board.scored else []
        fields = [Field(q.text(values[q.key]), values[q.key]) for q in quantities]
        rows.append([*(Field(text, text) for text in (*head, str(seed))), *quality, *fields])
        named = dict(zip(("sweep", "cell", "status"), head, strict=True)) | {"seed": seed}
        data.append(named | ({"fid": fid, "fid_std": std} if board.scored else {}) | values)
    numeric = ["seed", *(["FID"] if board.scored else []), *(q.head for q in quantities)]
    note = "Every cell that was found. ± is the standard deviation over the cell's clients."
    columns = ["sweep", "cell", "status", *numeric]
    return Table(f"{prefix}cells", "Cell by cell", note, columns, set(numeric), rows, data)


def _found(board: Board) -> list[Quantity]:
    """The scores that some cell has."""
    entries = board.entries.values()
    return [q for q in SCORES if any(entry.mean(q.read) is not None for entry in entries)]


def _fid(entry: Entry, best: bool) -> Field:
    """The FID, or why there is none."""
    if entry.fid is None:
        return Field(numbers.NONE if entry.status == "completed" else entry.status, None)
    return Field(numbers.score(entry.fid, entry.spread[0]), entry.fid, best)


def _place(board: Board, place: Place) -> list[Field]:
    shown = place if board.settings else place[1:]
    return [Field(str(part), part) for part in shown]


def _place_heads(board: Board) -> list[str]:
    return list(Place._fields if board.settings else Place._fields[1:])
