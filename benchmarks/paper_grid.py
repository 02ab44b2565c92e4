"""The cells of sweeps=paper_small beside the paper (arXiv 2406.12575), as tables in Markdown.

python benchmarks/paper_grid.py runs/paper_small [FOLDER ...]

FID by method, clients and partition; exchange against the paper's formulas; the order of the methods; claims.
"""

import csv
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, variance
from typing import NamedTuple

from gpu_tables import table
from scipy.special import stdtrit
from scipy.stats import kendalltau

import fedlight
from fedlight.reporting.paper import PUBLISHED

METHODS = ("FULL", "USPLIT", "UDEC", "ULATDEC")
REFERENCES = ("LOCAL", "CENTRAL")
PARTITIONS = ("iid", "label_skew", "quantity_skew")
CLIENTS = (2, 5, 10)
NEAR = 1.25
"""FIDs that differ by less than a quarter are near each other."""


class Cell(NamedTuple):
    """One completed cell: its settings, its scores, what it exchanged."""

    method: str
    clients: int
    partition: str
    seed: int
    result: dict
    folder: Path

    @property
    def fid(self) -> float:
        return self.result["fid"]["value"]

    @property
    def images(self) -> dict[int, int]:
        """Training images by client."""
        images: Counter[int] = Counter()
        with (self.folder / "partition.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                images[int(row["client"])] += int(row["count"])
        return dict(images)


Grid = dict[tuple[str, int, str], list[Cell]]
"""Cells of all seeds, by method, clients and partition."""


def read(folders: Iterable[str]) -> Grid:
    """The completed cells of some sweeps."""
    grid: Grid = defaultdict(list)
    for folder in folders:
        for row in fedlight.load(folder).itertuples():
            if row.status == "done":
                result = json.loads((Path(row.folder) / "result.json").read_text(encoding="utf-8"))
                cell = Cell(
                    row.method, int(row.clients), row.partition, int(row.seed), result, Path(row.folder)
                )
                grid[cell.method, cell.clients, cell.partition].append(cell)
    return grid


class Spread(NamedTuple):
    """Standard deviation of FID over seeds, as a share of FID, pooled over all places with several seeds."""

    share: float
    degrees: int

    def half_width(self, values: Sequence[Sequence[float]]) -> float:
        """Half of the 95 % interval of a difference between the means of two groups of seeds."""
        scale = sqrt(sum((self.share * mean(group)) ** 2 / len(group) for group in values))
        return float(stdtrit(self.degrees, 0.975)) * scale


def pooled_spread(grid: Grid) -> Spread | None:
    """The spread over seeds; None where no place has two seeds."""
    groups = [[cell.fid for cell in cells] for cells in grid.values() if len(cells) > 1]
    degrees = sum(len(group) - 1 for group in groups)
    if not degrees:
        return None
    squares = sum((len(group) - 1) * variance(group) / mean(group) ** 2 for group in groups)
    return Spread(sqrt(squares / degrees), degrees)


def expected_exchange(cell: Cell) -> str:
    """Whether the ledger's parameters equal the paper's formula (section 3), and the formula's value."""
    sizes, clients, rounds = cell.result["slices"], cell.clients, cell.result["rounds"]
    model, total = sum(sizes.values()), cell.result["exchange"]["params_total"]
    federated = {"UDEC": ("decoder",), "ULATDEC": ("bottleneck", "decoder"), "LOCAL": ()}
    if cell.method in federated:
        visit = sum(sizes[name] for name in federated[cell.method])
        expected = clients * (model + (2 * rounds - 1) * visit) if visit else clients * model
    elif cell.method == "FULL":
        expected = 2 * rounds * clients * model
    elif cell.method == "CENTRAL":
        expected = 0
    else:
        expected = rounds * (clients * model + clients // 2 * model)
        if clients % 2:  # the client that is left over: bottleneck, and by a coin encoder or decoder
            encoders = _slices_up(cell.folder)["encoder"] - rounds * (clients // 2)
            expected += rounds * sizes["bottleneck"] + encoders * sizes["encoder"]
            expected += (rounds - encoders) * sizes["decoder"]
    return f"{total:,} ({'equal' if total == expected else f'NOT EQUAL to {expected:,}'})"


def _slices_up(folder: Path) -> Counter[str]:
    with (folder / "ledger.csv").open(encoding="utf-8", newline="") as file:
        return Counter(row["slice"] for row in csv.DictReader(file) if row["direction"] == "up")


def score(cells: Sequence[Cell]) -> str:
    """Mean FID over seeds; the deviation is over seeds, or with one seed over the clients' models."""
    if not cells:
        return "–"
    values = [cell.fid for cell in cells]
    if len(values) > 1:
        return f"{mean(values):.1f} ± {sqrt(variance(values)):.1f} ({len(values)} seeds)"
    deviation = cells[0].result["fid"]["std"]
    return f"{values[0]:.1f}" + (f" [{deviation:.1f}]" if deviation is not None else "")


def places(grid: Grid) -> list[tuple[int, str]]:
    """Clients and partition of each place that has a cell of a federated method."""
    return sorted(
        {(clients, partition) for method, clients, partition in grid if method != "CENTRAL"},
        key=lambda place: (place[0], PARTITIONS.index(place[1])),
    )


def scores_table(grid: Grid) -> list[list[str]]:
    central = [cell for key, cells in grid.items() if key[0] == "CENTRAL" for cell in cells]
    return [
        [str(clients), partition]
        + [score(grid.get((method, clients, partition), [])) for method in (*METHODS, "LOCAL")]
        + [score(central)]
        for clients, partition in places(grid)
    ]


def published_order(methods: Iterable[str], partition: str) -> dict[str, float]:
    """The paper's order of methods, lowest FID first: FULL and USPLIT level, before the two partial ones.

    Raises:
        KeyError: for a method that the paper does not rank.
    """
    partial = [PUBLISHED[name, partition] for name in ("UDEC", "ULATDEC")]
    ranks = {"FULL": 0.0, "USPLIT": 0.0, "UDEC": partial[0], "ULATDEC": partial[1]}
    return {name: ranks[name] for name in methods}


def order_table(grid: Grid) -> list[list[str]]:
    rows = []
    for clients, partition in places(grid):
        ours = {m: mean(c.fid for c in grid[m, clients, partition]) for m in METHODS
                if grid.get((m, clients, partition))}  # fmt: skip
        if len(ours) == len(METHODS):
            paper = published_order(ours, partition)
            tau = kendalltau(list(paper.values()), list(ours.values()), variant="b").statistic
            rows.append(
                [str(clients), partition, ", ".join(sorted(ours, key=ours.__getitem__)), f"{tau:.2f}"]
            )
    return rows


class Claim(NamedTuple):
    """The FID of `first` is below (or above) `limit` times that of `second`.

    Both are places of the grid: method, clients, partition.
    """

    text: str
    first: tuple[str, int, str]
    second: tuple[str, int, str]
    limit: float
    below: bool


def claims(grid: Grid, clients: int) -> list[Claim]:
    """What the paper reports (section 6), as inequalities; `near` and `equals` are within a quarter."""
    central = next((key for key in grid if key[0] == "CENTRAL"), ("CENTRAL", clients, "iid"))
    full = ("FULL", clients, "iid")
    made = [Claim("FULL is near CENTRAL", full, central, NEAR, True)]
    for method, text in (("USPLIT", "equals FULL"), ("UDEC", "is near FULL"), ("ULATDEC", "is near FULL")):
        saved = [cell.result["exchange"]["reduction"] for cell in grid.get((method, clients, "iid"), [])]
        share = f" with {mean(saved):.0%} fewer parameters" if saved else ""
        made.append(Claim(f"{method} {text}{share}", (method, clients, "iid"), full, NEAR, True))
    for partition in PARTITIONS[1:]:
        for method in METHODS:
            made.append(
                Claim(f"{partition} hurts {method}", (method, clients, partition),
                      (method, clients, "iid"), 1, False)
            )  # fmt: skip
    return made


def judge(grid: Grid, claim: Claim, spread: Spread | None) -> tuple[str, str, str]:
    """The quotient of both FIDs, the difference to the limit with its interval, and the verdict."""
    first, second = ([cell.fid for cell in grid.get(key, [])] for key in (claim.first, claim.second))
    if not first or not second:
        return "–", "–", "not run yet"
    quotient = f"{mean(first) / mean(second):.2f}"
    if spread is None:
        return quotient, "–", "undecided: one seed"
    limits = [claim.limit * value for value in second]
    difference, half = mean(first) - mean(limits), spread.half_width([first, limits])
    interval = f"{difference:+.1f} ± {half:.1f}"
    if abs(difference) <= half:
        return quotient, interval, "undecided at this size"
    return quotient, interval, "comes out" if (difference < 0) == claim.below else "does not"


def claims_table(grid: Grid) -> list[list[str]]:
    spread = pooled_spread(grid)
    return [
        [
            str(clients),
            claim.text,
            f"{'<' if claim.below else '>'} {claim.limit}",
            *judge(grid, claim, spread),
        ]
        for clients in sorted({clients for method, clients, _ in grid if method != "CENTRAL"})
        for claim in claims(grid, clients)
    ]


def skew_table(grid: Grid) -> list[list[str]]:
    """FID on a skewed partition over FID on the iid one, by number of clients."""
    return [
        [partition, method, *(quotient(grid, method, clients, partition) for clients in CLIENTS)]
        for partition in PARTITIONS[1:]
        for method in (*METHODS, "LOCAL")
    ]


def quotient(grid: Grid, method: str, clients: int, partition: str) -> str:
    """Of the mean FIDs on a partition and on the iid one; a dash where one of them was not run."""
    skewed, even = (grid.get((method, clients, name)) for name in (partition, PARTITIONS[0]))
    if not skewed or not even:
        return "–"
    return f"{mean(cell.fid for cell in skewed) / mean(cell.fid for cell in even):.2f}"


def tiny_clients_table(grid: Grid) -> list[list[str]]:
    """FID of the client with the fewest and the most images under quantity skew."""
    rows = []
    for clients, partition in places(grid):
        for method in (*METHODS, "LOCAL"):
            for cell in grid.get((method, clients, partition), []):
                per_client = cell.result["fid"]["per_client"]
                if partition != "quantity_skew" or not per_client:
                    continue
                scored, images = cell.result["fid"]["clients"], cell.images
                fids = dict(zip(scored, per_client, strict=True))
                ends = (min(scored, key=images.__getitem__), max(scored, key=images.__getitem__))
                rows.append([str(clients), method, str(cell.seed)]
                            + [f"{fids[end]:.1f} ({images[end]} images)" for end in ends])  # fmt: skip
    return rows


def main(folders: Sequence[str]) -> None:
    """Prints the tables."""
    grid = read(folders)
    cells = [cell for group in grid.values() for cell in group]
    if not cells:
        sys.exit("no completed cell in " + ", ".join(folders))
    hours = sum(cell.result["seconds"]["total"] for cell in cells) / 3600
    print(f"{len(cells)} cells, {hours:.1f} hours of cells\n")
    tables = (
        (
            "FID",
            "± over seeds; with one seed [deviation over the clients' models].",
            ("clients", "partition", *METHODS, *REFERENCES),
            scores_table(grid),
        ),
        (
            "Exchange",
            "Parameters, both ways, all rounds, and whether they are those of the paper's formulas.",
            ("clients", "partition", "method", "seed", "parameters"),
            [[str(c.clients), c.partition, c.method, str(c.seed), expected_exchange(c)] for c in cells],
        ),
        (
            "Order",
            "Kendall's tau-b with the paper's order: FULL and USPLIT level, then the partial methods.",
            ("clients", "partition", "order here, lowest FID first", "tau"),
            order_table(grid),
        ),
        (
            "Claims",
            "near, equals: within a quarter. Interval: from the deviation over seeds, pooled over the grid.",
            ("clients", "claim", "quotient of FIDs", "here", "difference to the limit, 95 %", "verdict"),
            claims_table(grid),
        ),
        (
            "What skew costs",
            "FID on the partition over FID on the iid one.",
            ("partition", "method", *(f"{clients} clients" for clients in CLIENTS)),
            skew_table(grid),
        ),
        (
            "Quantity skew",
            "FID of the clients with the fewest and the most images.",
            ("clients", "method", "seed", "client of fewest images", "client of most images"),
            tiny_clients_table(grid),
        ),
    )
    for title, note, header, rows in tables:
        print(table(title, note, header, rows))


if __name__ == "__main__":
    main(sys.argv[1:] or ["runs/paper_small"])
