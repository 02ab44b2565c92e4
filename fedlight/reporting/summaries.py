"""The tables of a report: FID by method, methods in full, cell by cell."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

from fedlight.reporting import numbers
from fedlight.reporting.comparison import Comparison, Group, Place
from fedlight.reporting.setting_keys import AXES, varying_keys
from fedlight.reporting.tables import Field, ReportTable, number
from fedlight.runs.palette import rank
from fedlight.runs.reader import Result
from fedlight.runs.status import DONE, SweepCell


class Quantity(NamedTuple):
    """A number of a cell: head of its column, key in the CSV, functions that read and print it."""

    head: str
    key: str
    read: Callable[[Result], float | None]
    text: Callable[[float], str]


def _score(head: str, key: str, name: str, text: Callable[[float], str]) -> Quantity:
    return Quantity(head, key, lambda result: result.quality(name), text)


def _seconds(part: str, result: Result) -> float | None:
    return result.seconds.get(part)


def _peak_mb(result: Result) -> float | None:
    return result.memory.peak_mb if result.memory else None


def _gpu_peak_mb(result: Result) -> float | None:
    return result.memory.gpu_peak_mb if result.memory else None


def _total_flops(result: Result) -> float | None:
    return result.flops.total if result.flops else None


def _megabytes(value: float) -> str:
    return numbers.data_volume(1e6 * value)


def _flops(value: float) -> str:
    return f"{value:.2e}"


SCORES = (
    _score("own FID", "own_fid", "own.value", numbers.score),
    _score("KID", "kid", "kid", numbers.score),
    _score("precision", "precision", "precision", numbers.share),
    _score("recall", "recall", "recall", numbers.share),
    _score("density", "density", "density", numbers.share),
    _score("coverage (kNN)", "coverage_knn", "coverage_knn", numbers.share),
    Quantity("scored clients", "scored_clients", lambda result: result.scored_clients, numbers.count),
    _score("IS", "inception_score", "inception_score", numbers.score),
    _score("coverage", "coverage", "coverage.share", numbers.share),
    _score("entropy", "coverage_entropy", "coverage.entropy", numbers.score),
    _score("label accuracy", "label_accuracy", "label_accuracy.all", numbers.share),
    _score("label accuracy, seen classes", "label_accuracy_held", "label_accuracy.held", numbers.share),
    _score("label accuracy, unseen classes", "label_accuracy_unseen", "label_accuracy.unseen", numbers.share),
    _score("downstream accuracy", "downstream_accuracy", "downstream_accuracy.generated", numbers.share),
    _score("downstream, own images", "downstream_accuracy_own", "downstream_accuracy.own", numbers.share),
    _score("downstream, all images", "downstream_accuracy_all", "downstream_accuracy.all", numbers.share),
)
COSTS = (
    Quantity("parameters", "params", lambda result: result.exchange.params_total, numbers.count),
    Quantity("exchanged", "bytes", lambda result: result.exchange.bytes_total, numbers.data_volume),
    Quantity("vs FULL", "reduction", lambda result: result.exchange.reduction, numbers.saved),
    Quantity("loss", "train_loss", lambda result: result.train_loss, numbers.loss),
    Quantity("time", "seconds", lambda result: result.seconds.get("total"), numbers.seconds),
)
MEASURED_COSTS = (
    *(
        Quantity(f"time, {part}", f"seconds_{part}", partial(_seconds, part), numbers.seconds)
        for part in ("training", "merging", "evaluation", "sampling", "checkpoint", "startup")
    ),
    Quantity("memory", "peak_mb", _peak_mb, _megabytes),
    Quantity("GPU memory", "gpu_peak_mb", _gpu_peak_mb, _megabytes),
    Quantity("FLOPs", "flops", _total_flops, _flops),
)
"""Columns of the cell-by-cell table, where some cell has them."""
MARKED = (
    "Marked: the federated method with the lowest mean of a row and those level with it, whose paired "
    "difference to it has a 95 % interval that holds zero; none where all are level, or where one of them "
    "has one seed. In brackets: the 95 % interval of the mean over seeds (t)."
)
INTERVAL = "95 % interval"
ONE_SEED = "One seed: nothing is marked, since methods may differ by chance as much as seeds do."
MINOR = (
    *("± over", "entropy", "IS", "scored clients", "exchanged", "recall", "precision", "KID", "loss"),
    *("density", "coverage (kNN)", "coverage", "of all images", "of own images", "downstream accuracy"),
    *("label accuracy, unseen classes", "label accuracy, seen classes", "label accuracy", "own FID"),
    *("time, startup", "time, checkpoint", "time, merging", "time, sampling"),
    *("time, evaluation", "time, training", "FLOPs", "GPU memory", "memory", "time"),
)
"""Columns that the page hides where a table is too wide, the first ones first."""
SCOPES = {"global": "the global model", "clients": "mean over the clients' own models"}


def summaries(comparison: Comparison, prefix: str) -> list[ReportTable]:
    """The tables over methods; names of files begin with `prefix`."""
    quality = [by_method(comparison, prefix)] if comparison.evaluated else []
    return [*quality, in_full(comparison, prefix)]


def by_method(comparison: Comparison, prefix: str) -> ReportTable:
    """FID by place and method; the methods of `Comparison.best` are marked."""
    rows, data = [], []
    for place in comparison.places:
        best, groups = comparison.best(place), comparison.in_place(place)
        fields = {group.method: _fid(group, group.method in best) for group in groups}
        blank = Field(numbers.NONE, None)
        rows.append([*place_fields(comparison, place), *(fields.get(m, blank) for m in comparison.methods)])
        fids = {group.method: group.fid for group in groups}
        data.append(place_data(comparison, place) | fids | _bounds(groups))
    evaluated = [
        f"{', '.join(methods)}: {models}"
        for scope, models in SCOPES.items()
        if (methods := [m for m in comparison.methods if scope in comparison.scopes(m)])
    ]
    note = (
        f"Lower is better. {ONE_SEED if comparison.one_seed else MARKED} "
        f"Evaluated models: {'; '.join(evaluated)}. "
        "± is the standard deviation over seeds or, where there is one seed, over clients."
    )
    heads, numeric = place_heads(comparison)
    columns = [*heads, *comparison.methods]
    return ReportTable(
        f"{prefix}fid",
        "FID by method",
        note,
        columns,
        {*numeric, *comparison.methods},
        rows,
        data,
        kept=frozenset(comparison.methods),
    )


def in_full(comparison: Comparison, prefix: str) -> ReportTable:
    """A row for each method in its place: quality, exchange, loss and time."""
    quantities = _quantities(comparison.cells)
    rows, data = [], []
    for place in comparison.places:
        best = comparison.best(place)
        for group in comparison.in_place(place):
            if group.everywhere:
                continue
            means: dict[str, float | None] = {q.key: group.mean(q.read) for q in quantities}
            spread, over = group.spread
            marked = group.method in best
            fields = [number(means[q.key], q.text) for q in quantities]
            fid_field = _fid(group, marked)
            quality = [fid_field._replace(detail=""), Field(over, over)] if comparison.evaluated else []
            fid = {"fid": group.fid, "fid_std": spread, "fid_std_over": over, "best": marked}
            if comparison.has_intervals:
                low, high = group.interval[1:] if group.interval else (None, None)
                quality.append(Field(fid_field.detail or numbers.NONE, low))
                fid |= {"fid_low": low, "fid_high": high, "seeds": len(group.fid_by_seed)}
            named = [*place_fields(comparison, place), Field(group.method, group.method)]
            rows.append([*named, *quality, *fields, Field(group.status, group.status)])
            data.append(
                {"data": comparison.data, "extractor": comparison.extractor}
                | place_data(comparison, place)
                | {"method": group.method, **(fid if comparison.evaluated else {}), **means}
                | {"status": group.status}
            )
    heads, numeric = place_heads(comparison)
    fid_heads = ["FID", "± over"] if comparison.evaluated else []
    fid_heads += [INTERVAL] if comparison.has_intervals else []
    return ReportTable(
        f"{prefix}table",
        "Methods in full",
        "Means over seeds. own FID: against real images of the client's seen classes, those in its data. "
        "coverage: share of the classes that occur among the generated images; entropy of their "
        "distribution, in nats. label accuracy: share of the images that show the class that they are "
        "conditioned on; for all classes, the client's seen and its unseen ones. downstream accuracy: of a "
        "classifier trained on the generated images, beside those trained on a client's own images and on "
        "all; on real test images. "
        "Exchange counts both ways, all rounds and clients; vs FULL: what FULL "
        "exchanges with the same participants and reports. 95 % interval: of the mean FID over seeds (t).",
        [*heads, "method", *fid_heads, *(q.head for q in quantities), "status"],
        {*numeric, "FID", INTERVAL, *(q.head for q in quantities)},
        rows,
        data,
        minor=MINOR,
    )


def by_cell(
    cells: Sequence[SweepCell], prefix: str = "", among: Sequence[SweepCell] | None = None
) -> ReportTable:
    """A row for each cell, with its own numbers, and a column for each key in which cells differ.

    Args:
        cells: the rows.
        prefix: of the names of its files.
        among: all cells of the report, where there are others beside the rows.
    """
    keys = [
        *varying_keys(among or cells, (*AXES, "seed")),
        "partition.name",
        "clients",
        "method.name",
        "seed",
    ]
    quantities = [*_quantities(cells), *_known(MEASURED_COSTS, cells)]
    evaluated = any(cell.files.result and cell.files.result.fid for cell in cells)
    resampled = any(cell.files.result and _bootstrap(cell.files.result, "low") for cell in cells)
    rows, data = [], []
    for cell in sorted(cells, key=lambda cell: _position(cell, keys)):
        result = cell.files.result
        names = {"sweep": cell.sweep, "cell": cell.cell, "status": cell.state}
        settings = {head(key): cell.files.config.get(key) for key in keys}
        values = {q.key: q.read(result) if result else None for q in quantities}
        fid, std = (result.quality("value"), result.quality("std")) if result else (None, None)
        low, high = (_bootstrap(result, "low"), _bootstrap(result, "high")) if result else (None, None)
        bounds = numbers.NONE if low is None or high is None else numbers.interval(low, high)
        quality = [number(fid, partial(numbers.score, std=std))] if evaluated else []
        quality += [Field(bounds, low)] if resampled else []
        named = map(_setting, (*names.values(), *settings.values()))
        rows.append([*named, *quality, *(number(values[q.key], q.text) for q in quantities)])
        scores = {"fid": fid, "fid_std": std} if evaluated else {}
        scores |= {"fid_low": low, "fid_high": high} if resampled else {}
        data.append({**names, **settings, **scores, **values})
    fid_heads = [*(["FID"] if evaluated else []), *([INTERVAL] if resampled else [])]
    numbered = [*fid_heads, *(q.head for q in quantities)]
    heads = [*dict.fromkeys(map(head, keys))]  # `model` and `model.name` have one column
    columns = ["sweep", "cell", "status", *heads, *numbered]
    few = {"sweep", "data", "partition", "seed"}.intersection(columns)
    same = {name for name in few if len({repr(line[name]) for line in data}) == 1}
    shown = [column not in same for column in columns]
    return ReportTable(
        f"{prefix}cells",
        "Cell by cell",
        "Every cell that was planned or run. ± is the standard deviation over the cell's clients. Sweep, "
        "data, partition and seed are columns where they differ."
        + (f" {INTERVAL}: of the FID over the images drawn from the cell's models." if resampled else ""),
        [*compress(columns, shown)],
        {*numbered, *(name for name in heads if _numeric(line[name] for line in data))},
        [[*compress(row, shown)] for row in rows],
        data,
        minor=MINOR,
    )


def _bootstrap(result: Result, bound: str) -> float | None:
    return result.quality(f"bootstrap.{bound}")


def _quantities(cells: Sequence[SweepCell]) -> list[Quantity]:
    """The scores that some cell has, and the costs."""
    return [*_known(SCORES, cells), *COSTS]


def _known(quantities: Iterable[Quantity], cells: Sequence[SweepCell]) -> list[Quantity]:
    """The quantities that some cell has."""
    results = [cell.files.result for cell in cells if cell.files.result]
    return [q for q in quantities if any(q.read(result) is not None for result in results)]


def _position(cell: SweepCell, keys: list[str]) -> list[Any]:
    """Sorts cells by the values of the keys, numbers by size and methods by rank."""
    values = [(key, cell.files.config.get(key)) for key in keys]
    return [rank(str(value)) if key == "method.name" else numbers.rank(value) for key, value in values]


def _fid(group: Group, best: bool) -> Field:
    """The FID, or why there is none."""
    if group.fid is None:
        return Field(numbers.NONE if group.status == DONE else group.status, None)
    interval = group.interval
    bounds = numbers.interval(interval.low, interval.high) if interval else ""
    return Field(numbers.score(group.fid, group.spread[0]), group.fid, best, bounds)


def _bounds(groups: Iterable[Group]) -> dict[str, float | None]:
    """The bounds of the intervals of each method's FID, for the CSV."""
    intervals = {group.method: group.interval for group in groups}
    if not any(intervals.values()):
        return {}
    lows = {f"{method}_low": interval and interval.low for method, interval in intervals.items()}
    return lows | {f"{method}_high": interval and interval.high for method, interval in intervals.items()}


def place_fields(comparison: Comparison, place: Place) -> list[Field]:
    """The fields that name a place."""
    values = comparison.settings[place.setting].values()
    return [_setting(value) for value in (*values, place.partition, place.clients)]


def place_data(comparison: Comparison, place: Place) -> dict[str, Any]:
    """The columns of a CSV that name a place."""
    values = {head(key): value for key, value in comparison.settings[place.setting].items()}
    return place._asdict() | values


def place_heads(comparison: Comparison) -> tuple[list[str], set[str]]:
    """The heads of the columns that name a place, and those among them that hold numbers."""
    settings = comparison.settings.values()
    numeric = {head(key) for key in comparison.varying if _numeric(values[key] for values in settings)}
    return [*map(head, comparison.varying), "partition", "clients"], {*numeric, "clients"}


def head(key: str) -> str:
    """The column of a configuration key; a group, such as `model.name`, is named as it is typed: `model`."""
    return key.removesuffix(".name")


def _setting(value: Any) -> Field:
    """A value of the configuration."""
    text = numbers.plain(value)
    return Field(text, value if isinstance(value, float | int) else text)


def _numeric(values: Iterable[Any]) -> bool:
    return all(isinstance(value, float | int) and not isinstance(value, bool) for value in values)
