"""Comparisons of methods whose FID by seed is given, without files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlight.reporting.comparison import Comparison, Group, Place
from fedlight.runs.reader import CellFiles, Result
from fedlight.runs.status import DONE, SweepCell

PARAMS = {"FULL": 2000, "USPLIT": 1500, "UDEC": 700}


def make_comparison(
    fids: Mapping[str, Sequence[float]] | Sequence[Mapping[str, Sequence[float]]],
) -> Comparison:
    """One place for each mapping of method to FIDs, of seeds 0, 1 and so on; of 2, 3 and so on clients."""
    places = [fids] if isinstance(fids, Mapping) else fids
    groups = {}
    for clients, methods in enumerate(places, start=2):
        place = Place("", "iid", clients)
        for method, values in methods.items():
            cells = [_cell(method, seed, value) for seed, value in enumerate(values)]
            groups[place, method] = Group(place, method, cells)
    cells = [cell for group in groups.values() for cell in group.cells]
    return Comparison("digits", "classifier", cells, {"": {}}, groups)


def _cell(method: str, seed: int, fid: float) -> SweepCell:
    files = CellFiles(Path(f"{method}-s{seed}"))
    params = PARAMS.get(method, 1000)
    files.config = {"seed": seed, "partition.seed": 7, "method.name": method}
    files.result = Result.model_validate(
        {
            "schema": 1,
            "status": "completed",
            "rounds": 4,
            "seed": seed,
            "exchange": {"params_total": params, "bytes_total": 4 * params},
            "train_loss": 0.1,
            "fid": {"extractor": "classifier", "scope": "global", "value": fid},
            "seconds": {"total": 1},
            "versions": {},
        }
    )
    return SweepCell(files, DONE, 4, None, None, None, None)
