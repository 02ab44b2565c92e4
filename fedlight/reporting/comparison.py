"""Cells that may be compared, of one data set and one extractor, each in its place of the grid."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from statistics import mean, stdev
from typing import Any, NamedTuple

import pandas as pd

from fedlight.reporting.grid import Axes
from fedlight.reporting.records import CURVES, Record, Result, Score
from fedlight.runs.palette import rank

AXES = ("method.name", "clients", "partition.name")
REPLICAS = {"seed", "partition.seed"}
"""Keys over which a cell is repeated, not changed."""

IDLE = ("name", "output", "trainer.threads", "trainer.workers", "trainer.accelerator")
IDLE_PREFIXES = ("logger.", "method.", "partition.deal.", "data.source.")
PLACES = (".root", ".cache", ".weights")
REFERENCES = {"LOCAL", "CENTRAL"}
"""Methods that federate nothing: what the others are read against, not their competitors."""


class Place(NamedTuple):
    """A row of the grid: all but the method; `setting` says what else varies, as in `optimizer.lr=0.01`."""

    setting: str
    partition: str
    clients: int

    @property
    def label(self) -> str:
        text = f"{self.partition}, {self.clients} client{'s' if self.clients != 1 else ''}"
        return f"{text}, {self.setting}" if self.setting else text


@dataclass
class Entry:
    """A method in its place: the cells that were repeated over seeds.

    Attributes:
        everywhere: the method takes no part in the distribution of the data (CENTRAL), and its one result
            stands in every place.
    """

    place: Place
    method: str
    records: list[Record] = field(default_factory=list)
    everywhere: bool = False

    @cached_property
    def results(self) -> list[Result]:
        """Of the completed cells."""
        return [r.result for r in self.records if r.result is not None and r.status == "completed"]

    @property
    def status(self) -> str:
        """`completed`, or what became of the cells: `missing`, `1 failed`, `2 completed, 1 unfinished`."""
        states = [record.status for record in self.records]
        if not states:
            return "missing"
        kinds = sorted(set(states), key=lambda state: (state != "completed", state))
        return (
            kinds[0]
            if len(kinds) == len(states) == 1
            else ", ".join(f"{states.count(kind)} {kind}" for kind in kinds)
        )

    def mean(self, of: Callable[[Result], float | None]) -> float | None:
        """The mean over the completed cells that have the value."""
        values = [value for result in self.results if (value := of(result)) is not None]
        return mean(values) if values else None

    @property
    def fid(self) -> float | None:
        return self.mean(lambda result: result.quality("value"))

    @property
    def spread(self) -> tuple[float | None, str]:
        """Standard deviation of the FID, and what it is taken over: seeds, else the clients of one cell."""
        scores = [result.fid for result in self.results if result.fid]
        if len(scores) > 1:
            return stdev(score.value for score in scores), f"{len(scores)} seeds"
        if scores and scores[0].per_client and scores[0].std is not None:
            return scores[0].std, f"{len(scores[0].per_client)} clients"
        return None, ""


@dataclass(frozen=True)
class Board:
    """The cells of one data set and one extractor.

    Attributes:
        extractor: None where the cells do not say which.
        entries: by place and method; a combination that was not run is there, without cells.
    """

    data: str
    extractor: str | None
    records: list[Record]
    entries: dict[tuple[Place, str], Entry]

    @property
    def key(self) -> str:
        """For file names."""
        return f"{self.data}_{self.extractor}" if self.extractor else self.data

    @property
    def places(self) -> list[Place]:
        return sorted({place for place, _ in self.entries})

    @property
    def methods(self) -> list[str]:
        return sorted({method for _, method in self.entries}, key=rank)

    @property
    def settings(self) -> bool:
        """Whether anything varies beside method, clients, partition and seed."""
        return any(place.setting for place in self.places)

    def scopes(self, method: str) -> set[str]:
        """What was judged of a method: `global`, `clients`."""
        results = [r for (_, m), entry in self.entries.items() if m == method for r in entry.results]
        return {result.fid.scope for result in results if result.fid}

    @property
    def scored(self) -> bool:
        return any(entry.fid is not None for entry in self.entries.values())

    def in_place(self, place: Place) -> list[Entry]:
        """The entries of a place, in the order of the methods."""
        return [self.entries[place, m] for m in self.methods if (place, m) in self.entries]

    def best(self, place: Place) -> str | None:
        """The federated method with the lowest FID, where there are two to choose from."""
        fids = {e.method: e.fid for e in self.in_place(place) if e.method not in REFERENCES}
        scored = {method: fid for method, fid in fids.items() if fid is not None}
        return min(scored, key=scored.__getitem__) if len(scored) > 1 else None

    @cached_property
    def history(self) -> pd.DataFrame:
        """A row for each place, method and round: mean and standard deviation over seeds of each curve."""
        frames = [
            record.rounds.assign(place=place.label, method=method)
            for (place, method), entry in self.entries.items()
            for record in entry.records
            if not record.rounds.empty
        ]
        if not frames:
            return pd.DataFrame(columns=["place", "method", *CURVES])
        columns = list(CURVES[1:])
        grouped = pd.concat(frames).groupby(["place", "method", "round"], sort=False)[columns]
        spread = grouped.std().add_suffix("_std")
        return pd.concat([grouped.mean(), spread], axis=1).reset_index()


def make_boards(records: Iterable[Record], planned: list[Axes]) -> list[Board]:
    """Sorts the cells that can be placed by data set and extractor.

    Args:
        records: cells whose configuration cannot be read are left out.
        planned: what the sweeps set out to run; left aside where settings vary, which it does not tell apart.
    """
    placed = [r for r in records if all(key in r.config for key in (*AXES, "data.name"))]
    scored = [(r.config["data.name"], r.result.fid) for r in placed if r.result and r.result.fid]
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in placed:
        data = record.config["data.name"]
        known = [score for name, score in scored if name == data]
        groups.setdefault((data, _extractor(record, known)), []).append(record)
    return [_board(data, name or None, groups[data, name], planned) for data, name in sorted(groups)]


def _extractor(record: Record, known: list[Score]) -> str:
    """Of the cell's score; without one, of its configuration, or the only one that its data set knows.

    Extractors of one name are told apart by their hash where there are several.
    """
    if record.result and (score := record.result.fid):
        alike = {other.extractor_sha256 for other in known if other.extractor == score.extractor}
        return score.extractor + (f"-{str(score.extractor_sha256)[:8]}" if len(alike) > 1 else "")
    asked = record.config.get("evaluation.extractor")
    names = {score.extractor for score in known}
    return str(asked or (min(names) if len(names) == 1 else ""))


def _board(data: str, extractor: str | None, records: list[Record], planned: list[Axes]) -> Board:
    keys = varying([record.config for record in records])
    entries: dict[tuple[Place, str], Entry] = {}
    for record in records:
        config = record.config
        setting = ", ".join(f"{key}={config.get(key)}" for key in keys)
        place = Place(setting, config["partition.name"], int(config["clients"]))
        method = config["method.name"]
        entries.setdefault((place, method), Entry(place, method)).records.append(record)

    everywhere = {r.config["method.name"] for r in records if r.config.get("method.pool")}
    settings = {place.setting for place, _ in entries}
    asked = [axes for axes in planned if data in axes.data and len(settings) == 1]
    for setting in settings:
        run = [key for key in entries if key[0].setting == setting]
        partitions = {place.partition for place, _ in run}.union(*(axes.partition for axes in asked))
        clients = {place.clients for place, _ in run}.union(*(axes.clients for axes in asked))
        methods = {method for _, method in run}.union(*(axes.method for axes in asked))
        for partition, count, method in product(partitions, clients, methods):
            place = Place(setting, partition, count)
            if (place, method) in entries:
                continue
            pooled = [entries[key] for key in run if key[1] == method] if method in everywhere else []
            found = pooled[0].records if pooled else []
            entries[place, method] = Entry(place, method, found, everywhere=bool(pooled))
    return Board(data, extractor, records, entries)


def varying(configs: list[dict[str, Any]]) -> list[str]:
    """Keys that vary beside method, clients, partition and seeds, without those that another one decides.

    The method and the number of clients decide nothing: cells that differ in them and in their rounds do not
    compare, and must not look as if they did.
    """
    keys = {key for config in configs for key in config}
    candidates = [
        key
        for key in sorted(keys, key=lambda key: (not key.endswith(".name"), key.count("."), key))
        if key not in (*AXES, *IDLE, *REPLICAS)
        and not key.startswith(IDLE_PREFIXES)
        and not key.endswith(PLACES)
    ]
    kept: list[str] = []
    for key in candidates:
        deciding = (*kept, "partition.name") if key.startswith("partition.") else kept
        seen: dict[str, str] = {}
        for config in configs:
            known = repr([config.get(k) for k in deciding])
            if seen.setdefault(known, repr(config.get(key))) != repr(config.get(key)):
                kept.append(key)
                break
    return kept
