"""The values under the pointer, and FID over seconds."""

import re
from pathlib import Path

import pytest
from plausible import SECONDS, write_cell

from fedlight.reporting.comparison import make_comparisons
from fedlight.reporting.curves import name_curve
from fedlight.reporting.figures import make_plots
from fedlight.reporting.plots import HEIGHT, WIDTH, Plot
from fedlight.runs.status import read_sweep

POINTS = 72  # an inch


@pytest.fixture
def plots(tmp_path: Path) -> dict[str, Plot]:
    for method in ("FULL", "UDEC"):
        for seed in (1, 2):
            write_cell(tmp_path / "made", method, 2, seed=seed, picture=False)
    (comparison,) = make_comparisons(read_sweep(tmp_path / "made"))
    return {plot.name: plot for plot in make_plots(comparison, "")}


@pytest.mark.parametrize("name", ["quality_exchange", "budget", "fid_seconds", "fid_rounds", "client_spread"])
def test_the_points_of_a_curve_lie_on_its_marks(plots: dict[str, Plot], name: str) -> None:
    (panel,) = plots[name].panels
    svg, curves = plots[name].view(panel)
    drawn = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"', svg)
    marks = {
        (round(1000 * float(x) / POINTS / WIDTH), round(1000 * float(y) / POINTS / HEIGHT)) for x, y in drawn
    }
    points = [(point.x, point.y) for curve in curves for point in curve.points]
    assert points
    assert set(points) <= marks


def test_a_point_names_its_cell_and_its_values(plots: dict[str, Plot]) -> None:
    plot = plots["budget"]
    _, curves = plot.view("iid, 2 clients")
    row = plot.data[plot.data["method"] == "UDEC"].iloc[-1]
    curve = next(curve for curve in curves if curve.name.startswith("UDEC"))
    assert curve.name == f"UDEC: {row['cells'].split()[0]} and 1 more"
    assert curve.points[-1].text == f"round 4, 16.0 kB: FID {row['fid']:.2f} ± {row['fid_std']:.2f}"


def test_seconds_are_those_of_all_rounds_so_far(plots: dict[str, Plot]) -> None:
    data = plots["fid_seconds"].data
    assert list(data["round"]) == [2, 4, 2, 4]
    assert list(data["seconds_cumulative"]) == [2 * SECONDS * n for n in (2, 4, 2, 4)]


def test_a_curve_of_one_cell_has_its_name_alone() -> None:
    assert name_curve("FULL", "FULL-K2") == "FULL: FULL-K2"
    assert (
        name_curve("FULL", "FULL-K2 FULL-K3", transform="int8") == "FULL, transform int8: FULL-K2 and 1 more"
    )
    assert name_curve("FULL", "FULL-K2", transform="none") == "FULL: FULL-K2"


def test_a_method_without_exchange_is_a_line_for_each_number_of_clients(tmp_path: Path) -> None:
    for method, clients in (("FULL", 2), ("LOCAL", 2), ("LOCAL", 5), ("CENTRAL", 2)):
        write_cell(tmp_path / "made", method, clients, picture=False)
    (comparison,) = make_comparisons(read_sweep(tmp_path / "made"))
    plot = next(plot for plot in make_plots(comparison, "") if plot.name == "quality_exchange")
    _, curves = plot.view("iid")
    lines = [curve for curve in curves if len(curve.points) > 1]
    assert [curve.name.partition(":")[0] for curve in lines] == ["LOCAL", "LOCAL", "CENTRAL"]
    assert all(len({point.y for point in curve.points}) == 1 for curve in lines)
    texts = [curve.points[0].text for curve in lines if curve.name.startswith("LOCAL")]
    assert [text.partition(": ")[0] for text in texts] == [
        f"{clients} clients, nothing exchanged" for clients in (2, 5)
    ]
