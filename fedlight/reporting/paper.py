"""The numbers of the paper (arXiv 2406.12575) beside those of a sweep that covers its cells."""

from fedlight.reporting import numbers
from fedlight.reporting.comparison import Comparison
from fedlight.reporting.tables import Field, ReportTable, number

DATA, MODEL, CLIENTS = "fmnist", "paper", 5
PROTOCOL = {"rounds": 15, "epochs": 5, "data.batch_size": 128, "data.limit": None, "optimizer.lr": 1e-4}
PUBLISHED = {
    ("UDEC", "iid"): 47.9,
    ("UDEC", "label_skew"): 70.2,
    ("UDEC", "quantity_skew"): 142.0,
    ("ULATDEC", "iid"): 49.2,
    ("ULATDEC", "label_skew"): 70.5,
    ("ULATDEC", "quantity_skew"): 121.0,
    ("CENTRAL", "iid"): 42.5,
}
"""FID by method and partition, means over five clients' models; CENTRAL: the one model of the datacenter."""

CAVEAT = (
    f"FID with {CLIENTS} clients, mean over the clients' models, and its order from the lowest. Only the "
    "order is comparable: the paper drew 1,000 samples and clipped images to [0, 1] without rescaling them "
    "from [−1, 1]."
)
COLUMNS = ("method", "partition", "paper", "this sweep", "order, paper", "order, here")

Fids = dict[tuple[str, str], float]


def beside_paper(comparison: Comparison, prefix: str) -> ReportTable | None:
    """Published and measured FID; None without evaluated cells of the paper's data and model."""
    rows, data, departures = [], [], set()
    for setting in comparison.settings:
        ours: Fids = {}
        for (place, method), group in comparison.groups.items():
            key = (method, place.partition)
            if (place.setting, place.clients) != (setting, CLIENTS) or key not in PUBLISHED:
                continue
            if group.fid is not None and _of_the_paper(group.cells[0].files.config):
                ours[key] = group.fid
                departures |= _departures(group.cells[0].files.config)
        rankings = (_ranks(PUBLISHED, ours), _ranks(ours, ours))
        for (method, partition), published in PUBLISHED.items() if ours else ():
            measured, ranks = ours.get((method, partition)), [r.get((method, partition)) for r in rankings]
            printed = [
                Field(method, method),
                Field(partition, partition),
                Field(f"{published:.1f}", published),
                Field("missing" if measured is None else numbers.score(measured), measured),
                *(number(rank, numbers.count) for rank in ranks),
            ]
            rows.append([Field(setting, setting), *printed] if comparison.varying else printed)
            raw = (setting, method, partition, published, measured, *ranks)
            data.append(dict(zip(("setting", *COLUMNS), raw, strict=True)))
    if not rows:
        return None
    notes = [CAVEAT]
    if comparison.extractor != "inception":
        notes.append(f"Here FID is taken over the features of the {comparison.extractor}.")
    if departures:
        notes.append(f"This sweep departs from the paper's settings: {', '.join(sorted(departures))}.")
    columns = ["setting", *COLUMNS] if comparison.varying else list(COLUMNS)
    numeric = set(COLUMNS[2:])
    return ReportTable(
        f"{prefix}paper", "Comparison with the paper", " ".join(notes), columns, numeric, rows, data
    )


def _of_the_paper(config: dict[str, object]) -> bool:
    return (config["data.name"], config.get("model.name")) == (DATA, MODEL)


def _departures(config: dict[str, object]) -> set[str]:
    return {
        f"{key}={numbers.plain(config.get(key))} instead of {numbers.plain(value)}"
        for key, value in PROTOCOL.items()
        if config.get(key) != value
    }


def _ranks(values: Fids, among: Fids) -> dict[tuple[str, str], int]:
    """The rank of each of `among` by `values`, from 1, the lowest."""
    ranked = sorted(among, key=values.__getitem__)
    return {key: position for position, key in enumerate(ranked, start=1)}
