"""The sentence on top of the page: what a comparison shows, in numbers that its seeds support."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, expm1, log
from statistics import mean
from typing import Any

from fedlight.reporting.comparison import REFERENCES, Comparison, Group, Place
from fedlight.reporting.intervals import Difference, paired_difference

SAME = 0.01  # shares of the exchange closer than this count as equal
FULL = "FULL"
NAMED_PLACES = 2  # more are counted
NAMED_SETTINGS = 3  # the others are in the tables


@dataclass(frozen=True)
class Contender:
    """A method, or where there is one method a setting: its groups by place.

    Attributes:
        unit: what its exchange is counted in.
        exchanged: in all places, of one seed.
    """

    name: str
    groups: Mapping[Any, Group]
    unit: str

    def exchanged(self, places: set[Any]) -> float:
        """What one cell of each place exchanges, in parameters or bytes."""
        totals = [
            self.groups[p].mean(lambda result: getattr(result.exchange, f"{self.unit}_total")) for p in places
        ]
        return sum(total or 0.0 for total in totals)

    def log_fids(self, places: set[Any]) -> dict[Any, float]:
        """The mean of log FID over places, by seed; of the seeds that every place has."""
        tables = [self.groups[place].fid_by_seed for place in places]
        seeds = set.intersection(*(set(table) for table in tables)) if tables else set()
        return {
            seed: mean(log(table[seed]) for table in tables)
            for seed in sorted(seeds, key=str)
            if all(table[seed] > 0 for table in tables)
        }


def headline(comparison: Comparison) -> str:
    """What the comparison shows: the best methods, and what the others cost and save against FULL.

    Differences in FID are said only where the seeds support them: the paired difference of log FID, averaged
    over places, has an interval without zero (together for all that is said, 95 %). Empty where fewer than
    two methods or settings were evaluated.
    """
    contenders = _methods(comparison) or _settings(comparison)
    if len(contenders) < 2:
        return ""
    most = max(contenders, key=lambda contender: contender.exchanged(set(contender.groups)))
    baseline = next((contender for contender in contenders if contender.name == FULL), most)
    others = [contender for contender in contenders if contender is not baseline]
    if baseline.unit == "bytes":
        others = sorted(others, key=_first_named)[:NAMED_SETTINGS]
    clauses = [clause for other in others if (clause := _against(baseline, other, len(others)))]
    if not clauses:
        return ""
    clauses[0] += " parameters" if baseline.unit == "params" else " bytes"  # what all of them count
    seeds = max(len(group.fid_by_seed) for contender in contenders for group in contender.groups.values())
    shared = {len(set(baseline.groups) & set(other.groups)) for other in others}
    rows = f"{max(shared)} rows" if len(shared) == 1 else "the rows that both have"
    average = f", on average over {rows}" if max(shared) > 1 else ""
    against = f"against {baseline.name}{average}, {_listed(clauses)}"
    if seeds < 2:
        return f"One seed, so differences in FID may be chance; {against}."
    best = _best(comparison)
    opening = f"Over {seeds} seeds, {best}; " if best else f"Over {seeds} seeds, "
    return f"{opening}{against}."


def _methods(comparison: Comparison) -> list[Contender]:
    """The federated methods that have a FID."""
    groups: dict[str, dict[Place, Group]] = {}
    for (place, method), group in comparison.groups.items():
        if method not in REFERENCES and group.fids:
            groups.setdefault(method, {})[place] = group
    contenders = [
        Contender(method, groups[method], "params") for method in comparison.methods if method in groups
    ]
    return contenders if len(contenders) > 1 else []


def _settings(comparison: Comparison) -> list[Contender]:
    """The settings of the only federated method, if they differ in the bytes that are exchanged."""
    groups: dict[str, dict[tuple[str, int], Group]] = {}
    for (place, method), group in comparison.groups.items():
        if method not in REFERENCES and group.fids:
            groups.setdefault(place.setting, {})[place.partition, place.clients] = group
    contenders = [Contender(name, groups[name], "bytes") for name in comparison.settings if name in groups]
    totals = [contender.exchanged(set(contender.groups)) for contender in contenders]
    return contenders if totals and max(totals) > (1 + SAME) * min(totals) else []


def _first_named(setting: Contender) -> tuple[int, float]:
    """Orders settings: most seeds first, then the lowest FID."""
    groups = setting.groups.values()
    return -max(len(group.fid_by_seed) for group in groups), mean(group.fid or 0.0 for group in groups)


def _against(baseline: Contender, other: Contender, comparisons: int) -> str:
    """What a contender costs in FID and saves in exchange; empty without a common place."""
    places = set(baseline.groups) & set(other.groups)
    if not places:
        return ""
    share = other.exchanged(places) / (baseline.exchanged(places) or 1.0)
    changed = 100 * abs(1 - share)
    saved = f"{changed:.{1 if 99 <= changed < 100 else 0}f} % {'fewer' if share < 1 else 'more'}"
    saved = saved if abs(1 - share) >= SAME else "as many"
    difference = paired_difference(other.log_fids(places), baseline.log_fids(places), comparisons)
    if difference is None:
        return f"{other.name} exchanges {saved}"
    return f"{other.name} {_quality(difference)} for {saved}"


def _quality(difference: Difference) -> str:
    """A difference of log FID in words."""
    if difference.is_level:
        return "is level"
    ratio, low, high = difference.interval
    if low >= log(2):
        return f"has {exp(ratio):.1f} times the FID ({exp(low):.1f} to {exp(high):.1f})"
    least, most = sorted((abs(expm1(low)), abs(expm1(high))))
    verb = "costs" if ratio > 0 else "saves"
    return f"{verb} {100 * abs(expm1(ratio)):.0f} % of FID ({100 * least:.0f} to {100 * most:.0f} %)"


def _best(comparison: Comparison) -> str:
    """Which methods are marked as best, and where."""
    marked: dict[tuple[str, ...], list[Place]] = {}
    places = [place for place in comparison.places if len(comparison.differences(place)) > 0]
    for place in places:
        best = comparison.best(place)
        if best:
            marked.setdefault(tuple(m for m in comparison.methods if m in best), []).append(place)
    ranked = sorted(marked.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{_listed(list(methods))} {_rank(methods)}{_where(w, places)}" for methods, w in ranked)


def _rank(methods: tuple[str, ...]) -> str:
    return "is best" if len(methods) == 1 else "are level and ahead of the others"


def _where(where: list[Place], places: list[Place]) -> str:
    """In which of the places."""
    if len(where) == len(places):
        return "" if len(places) == 1 else f" in all {len(places)} rows"
    if len(where) > NAMED_PLACES:
        return f" in {len(where)} of {len(places)} rows"
    varied = [len({place[i] for place in places}) > 1 for i in range(3)]
    names = []
    for place in where:
        named = (place.setting, place.partition, f"{place.clients} clients")
        names.append(", ".join(name for name, varies in zip(named, varied, strict=True) if varies))
    return f" with {' and with '.join(names)}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
