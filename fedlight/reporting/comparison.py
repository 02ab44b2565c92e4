"""Cells that may be compared: those of one data set and one extractor, grouped by place and method."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from statistics import mean, stdev
from typing import Any, NamedTuple

from fedlight.reporting import numbers
from fedlight.reporting.file_name import file_name
from fedlight.reporting.intervals import Difference, Interval, paired_difference, t_interval
from fedlight.reporting.setting_keys import AXES, REPEATED, describe_setting, varying_keys
from fedlight.runs.palette import colours, rank
from fedlight.runs.reader import ImageQuality, Result
from fedlight.runs.status import DONE, MISSING, SweepCell

SEEDS = ("seed", "partition.seed")
"""What two methods have in common where they are compared in pairs."""

REFERENCES = {"LOCAL", "CENTRAL"}
"""Methods that federate nothing: the others are compared with them, and they are never marked as best."""


class Place(NamedTuple):
    """A row of the grid: all but the method; `setting` is what else varies, such as `optimizer.lr=0.01`."""

    setting: str
    partition: str
    clients: int

    @property
    def panel(self) -> str:
        """The place without the number of clients."""
        return f"{self.partition}, {self.setting}" if self.setting else self.partition

    @property
    def label(self) -> str:
        text = f"{self.partition}, {self.clients} client{'s' if self.clients != 1 else ''}"
        return f"{text}, {self.setting}" if self.setting else text


@dataclass
class Group:
    """The cells of a method in a place; they differ in their seeds.

    Attributes:
        everywhere: the method does not depend on the partition (CENTRAL), and its one result stands in every
            place.
    """

    place: Place
    method: str
    cells: list[SweepCell] = field(default_factory=list)
    everywhere: bool = False

    @cached_property
    def results(self) -> list[Result]:
        """Of the cells that are done."""
        return [cell.files.result for cell in self.cells if cell.state == DONE and cell.files.result]

    @property
    def names(self) -> str:
        """The ids of the cells that are done, separated by spaces."""
        return " ".join(cell.cell for cell in self.cells if cell.state == DONE)

    @property
    def status(self) -> str:
        """The state of the cells: `done`, `1 failed`, `2 done, 1 interrupted`; `missing` without a cell."""
        states = [cell.state for cell in self.cells] or [MISSING]
        kinds = sorted(set(states), key=lambda state: (state != DONE, state))
        if len(states) == 1:
            return states[0]
        return kinds[0] if kinds == [DONE] else ", ".join(f"{states.count(kind)} {kind}" for kind in kinds)

    def mean(self, of: Callable[[Result], float | None]) -> float | None:
        """The mean over the results that have the value."""
        values = [value for result in self.results if (value := of(result)) is not None]
        return mean(values) if values else None

    @property
    def fid(self) -> float | None:
        return self.mean(lambda result: result.quality("value"))

    @property
    def fids(self) -> list[float]:
        """The FID of each result that has one: of each seed."""
        return [result.fid.value for result in self.results if result.fid]

    @property
    def fid_by_seed(self) -> dict[tuple[str, ...], float]:
        """The FID by the seeds of the cell and of its partition; cells of equal seeds are averaged."""
        fids: dict[tuple[str, ...], list[float]] = {}
        for cell in self.cells:
            if cell.state == DONE and cell.files.result and cell.files.result.fid:
                seeds = tuple(numbers.plain(cell.files.config.get(key)) for key in SEEDS)
                fids.setdefault(seeds, []).append(cell.files.result.fid.value)
        return {seeds: mean(values) for seeds, values in fids.items()}

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the mean FID over seeds; None with one seed."""
        return t_interval(list(self.fid_by_seed.values()))

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
class Comparison:
    """The cells of one data set and one extractor.

    Attributes:
        extractor: None where the cells do not say which.
        settings: setting of a place: its values by key, in the order of the values; the keys are those that
            vary beside method, clients, partition and seeds.
        groups: by place and method; a combination that was not run is there, without cells.
    """

    data: str
    extractor: str | None
    cells: list[SweepCell]
    settings: dict[str, dict[str, Any]]
    groups: dict[tuple[Place, str], Group]

    @property
    def key(self) -> str:
        """For file names."""
        return file_name(f"{self.data}_{self.extractor}" if self.extractor else self.data)

    @property
    def places(self) -> list[Place]:
        settings = list(self.settings)
        return sorted({place for place, _ in self.groups}, key=lambda p: (settings.index(p.setting), *p[1:]))

    @property
    def methods(self) -> list[str]:
        return sorted({method for _, method in self.groups}, key=rank)

    @property
    def palette(self) -> dict[str, str]:
        """The colour of each method."""
        return colours(set(self.methods))

    @property
    def varying(self) -> list[str]:
        """The keys of the settings."""
        return list(next(iter(self.settings.values()), {}))

    def scopes(self, method: str) -> set[str]:
        """What was evaluated of a method: `global`, `clients`."""
        results = [result for (_, m), group in self.groups.items() if m == method for result in group.results]
        return {result.fid.scope for result in results if result.fid}

    @property
    def evaluated(self) -> bool:
        """Whether any cell has a FID."""
        return any(group.fid is not None for group in self.groups.values())

    def in_place(self, place: Place) -> list[Group]:
        """The groups of a place, method after method."""
        return [self.groups[place, m] for m in self.methods if (place, m) in self.groups]

    def differences(self, place: Place) -> dict[tuple[str, str], Difference | None]:
        """The differences in FID between the federated methods of a place, for all pairs of them.

        The intervals of all pairs hold together with 95 % confidence, so that in a place of equal methods
        any two are called different in at most one of twenty sweeps. A pair is (lower, higher) by mean FID;
        the difference is higher − lower, and None where the two have fewer than two seeds in common.
        """
        rivals = sorted(self._rivals(place), key=lambda group: mean(group.fids))
        pairs = list(combinations(rivals, 2))
        return {
            (lower.method, higher.method): paired_difference(
                higher.fid_by_seed, lower.fid_by_seed, comparisons=len(pairs)
            )
            for lower, higher in pairs
        }

    def best(self, place: Place) -> frozenset[str]:
        """The federated methods that are level with the one of the lowest mean FID, and that one.

        The set is empty where that is all of them, and where one of them has fewer than two seeds in common
        with the lowest.
        """
        rivals = self._rivals(place)
        if len(rivals) < 2:
            return frozenset()
        lowest = min(rivals, key=lambda group: mean(group.fids)).method
        against = {
            pair[1]: difference for pair, difference in self.differences(place).items() if pair[0] == lowest
        }
        level = {m for m, difference in against.items() if difference and difference.interval.low <= 0}
        if None in against.values() or len(level) == len(against):
            return frozenset()
        return frozenset({lowest, *level})

    def _rivals(self, place: Place) -> list[Group]:
        """The federated methods of a place that have a FID."""
        return [g for g in self.in_place(place) if g.method not in REFERENCES and g.fids]

    @property
    def has_intervals(self) -> bool:
        """Whether any mean has an interval over seeds."""
        return any(group.interval for group in self.groups.values())

    @property
    def one_seed(self) -> bool:
        """Whether no federated method has a FID of more than one seed."""
        groups = self.groups.values()
        return all(len(group.fids) < 2 for group in groups if group.method not in REFERENCES)


def make_comparisons(cells: Iterable[SweepCell]) -> list[Comparison]:
    """Groups cells by data set and extractor; those whose configuration is unknown are left out."""
    placed = [cell for cell in cells if all(key in cell.files.config for key in (*AXES, "data.name"))]
    known: dict[str, list[ImageQuality]] = {}
    for cell in placed:
        if cell.files.result and cell.files.result.fid:
            known.setdefault(cell.files.config["data.name"], []).append(cell.files.result.fid)
    parts: dict[tuple[str, str], list[SweepCell]] = {}
    for cell in placed:
        data = cell.files.config["data.name"]
        parts.setdefault((data, _extractor(cell, known.get(data, []))), []).append(cell)
    return [_comparison(data, name or None, parts[data, name]) for data, name in sorted(parts)]


def _extractor(cell: SweepCell, known: list[ImageQuality]) -> str:
    """That of the cell's FID; without one, that of its configuration, or the only one of its data set.

    Where several extractors have the same name, a part of their hash is added.
    """
    if cell.files.result and (quality := cell.files.result.fid):
        hashes = {other.extractor_sha256 for other in known if other.extractor == quality.extractor}
        return quality.extractor + (f"-{str(quality.extractor_sha256)[:8]}" if len(hashes) > 1 else "")
    names = {quality.extractor for quality in known}
    return str(cell.files.config.get("evaluation.extractor") or (min(names) if len(names) == 1 else ""))


def _comparison(data: str, extractor: str | None, cells: list[SweepCell]) -> Comparison:
    keys = varying_keys(cells, (*AXES, *REPEATED))
    settings: dict[str, dict[str, Any]] = {}
    groups: dict[tuple[Place, str], Group] = {}
    for cell in cells:
        config = cell.files.config
        values = {key: config.get(key) for key in keys}
        setting = describe_setting(values)
        settings[setting] = values
        place = Place(setting, config["partition.name"], int(config["clients"]))
        method = config["method.name"]
        groups.setdefault((place, method), Group(place, method)).cells.append(cell)

    settings = dict(sorted(settings.items(), key=lambda item: [numbers.rank(v) for v in item[1].values()]))
    everywhere = {cell.files.config["method.name"] for cell in cells if cell.files.config.get("method.pool")}
    for setting in settings:
        present = {key: group for key, group in groups.items() if key[0].setting == setting}
        partitions = {place.partition for place, _ in present}
        clients = {place.clients for place, _ in present}
        methods = {method for _, method in present}
        for partition, count, method in product(partitions, clients, methods):
            place = Place(setting, partition, count)
            if (place, method) not in present:
                pooled = [
                    group for key, group in present.items() if key[1] == method and method in everywhere
                ]
                shared = pooled[0].cells if pooled else []
                groups[place, method] = Group(place, method, shared, everywhere=bool(pooled))
    return Comparison(data, extractor, cells, settings, groups)
