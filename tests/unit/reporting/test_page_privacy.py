"""What the page says of privacy."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from conftest import Cell
from matplotlib.figure import Figure
from plausible import read_result, write_cell

from fedlight.privacy.account import Account
from fedlight.reporting import figures
from fedlight.reporting.comparison import make_comparisons
from fedlight.reporting.page import write_report
from fedlight.reporting.plots import Plot
from fedlight.reporting.privacy_cost import quality_epsilon
from fedlight.runs.status import read_sweep

MakeCell = Callable[..., Cell]


@pytest.mark.slow
def test_the_page_shows_guarantee_epsilon_and_attacks(cell: MakeCell, tmp_path: Path) -> None:
    made = cell("method=UDEC", "clients=3", "privacy=client", "privacy.noise=2")
    other = cell("method=UDEC", "clients=3", "privacy=client", "privacy.noise=0", "privacy.clip=inf")
    shutil.move(other.folder, made.folder.parent / other.folder.name)
    attack = {"sees": "released model", "attack": "PIA", "auc": [0.9, 0.8, 0.95], "epsilon_lower": 1.5}
    attack |= {"tpr_at_0.01": [0.3, 0.2, 0.4], "tpr_at_0.001": [0.1, 0, 0.2]}
    attack |= {"roc": [[0, 0.1], [0.5, 0.9], [1, 1]]}
    (made.folder / "audit.json").write_text(json.dumps({"attacks": [attack]}))
    write_report([made.folder.parent], tmp_path / "report")

    def table(name: str) -> list[dict[str, str]]:
        with (tmp_path / "report" / f"{name}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    stated = Account(2, 1, 1e-5).epsilon(2)
    guarantees = {row["epsilon"]: row for row in table("privacy")}
    assert guarantees.keys() == {str(stated), "inf"}
    assert guarantees[str(stated)]["noise"] == "2.0"
    assert [float(row["epsilon"]) for row in table("epsilon_rounds")] == pytest.approx(
        [Account(2, 1, 1e-5).epsilon(1), stated]
    )
    assert [(row["sees"], row["auc"]) for row in table("attacks")] == [("released model", "0.9")]
    assert len(table("roc")) == 3
    page = (tmp_path / "report" / "index.html").read_text()
    for part in ("guarantees", "epsilon over rounds", "attacks", "ROC of the attacks"):
        assert f"Privacy: {part}" in page


def write_private(
    sweep: Path, epsilon: float | None, clip: float = 2, kind: str = "client", lr: float = 0.1, **cell: Any
) -> float:
    """Writes a cell with an epsilon, or without privacy for None; returns its FID."""
    config = {"name": kind, "noise": 1.0, "clip": clip, "delta": 1e-5, "target_epsilon": epsilon}
    private = {} if epsilon is None else {"privacy": config}
    folder = write_cell(sweep, picture=False, sections={**private, "optimizer": {"lr": lr}}, **cell)
    result = read_result(folder)
    if epsilon is not None:
        spent = {"kind": kind, "epsilon": 0.999 * epsilon, "delta": 1e-5, "noise": 1, "clip": clip}
        result["privacy"] = {key: "inf" if value == math.inf else value for key, value in spent.items()}
    (folder / "result.json").write_text(json.dumps(result))
    return float(result["fid"]["value"])


def cost(sweep: Path) -> Plot:
    (comparison,) = make_comparisons(read_sweep(sweep))
    return quality_epsilon(comparison, "")


def test_quality_against_epsilon_has_a_point_per_guarantee_averaged_over_seeds(tmp_path: Path) -> None:
    fids = {
        epsilon: [write_private(tmp_path, epsilon, seed=s) for s in (1, 2, 3)]
        for epsilon in (10, 1, math.inf)
    }
    write_private(tmp_path, 0)  # spent nothing, in no round, and has no place on a logarithmic axis
    plot = cost(tmp_path)
    points = plot.data.set_index("epsilon")
    assert set(points.index) == {9.99, 0.999, math.inf}
    assert set(plot.data["panel"]) == {"iid"}
    for epsilon, values in fids.items():
        row = points.loc[0.999 * epsilon]
        assert (row["method"], row["clients"], row["fid_std_over"]) == ("FULL", 5, "3 seeds")
        assert (row["fid"], row["fid_std"]) == pytest.approx((mean(values), stdev(values)))


def test_cells_without_a_guarantee_are_set_apart_in_the_panels_of_their_recipe(tmp_path: Path) -> None:
    for kind, clip in (("client", 2), ("client", 0.5), ("example", 2)):
        for epsilon in (1, 10, math.inf):
            write_private(tmp_path, epsilon, clip, kind)
    unclipped = write_private(tmp_path, math.inf, math.inf)
    plain = write_private(tmp_path, None)
    write_private(tmp_path, None, lr=0.2)  # neither another recipe
    write_private(tmp_path, None, partition="label_skew")  # nor another deal of the images
    plot = cost(tmp_path)
    panels = plot.data.groupby("panel")
    client = {f"iid, privacy.name=client, privacy.clip={clip}" for clip in (0.5, 2)}
    assert panels.groups.keys() == client | {"iid, privacy.name=example, privacy.clip=2"}
    for panel, rows in panels:
        nothing = {unclipped, plain} if panel in client else {plain}
        assert set(rows["fid"][rows["epsilon"].isna()]) == nothing
        axis = Figure().subplots()
        plot.draw(axis, rows)
        assert axis.get_xscale() == "log"
        labels = {
            label.get_text(): at for at, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
        }
        (border,) = (line for line in axis.lines if line.get_linestyle() == ":")
        edge = border.get_xdata()[0]
        assert labels["1"] < labels["10"] < edge < labels["inf"] < labels["none"]
        (joined,) = (line for line in axis.lines if line.get_linestyle() == "-")
        assert list(joined.get_xdata()) == [0.999, 9.99]


def test_quality_against_epsilon_needs_two_epsilons_of_a_method(tmp_path: Path) -> None:
    write_private(tmp_path, 3)
    write_private(tmp_path, 10, method="UDEC")
    write_private(tmp_path, None)
    assert cost(tmp_path).data.empty
    write_private(tmp_path, 1)
    (comparison,) = make_comparisons(read_sweep(tmp_path))
    (plot,) = (plot for plot in figures.make_plots(comparison, "") if plot.name == "quality_epsilon")
    assert list(plot.legend) == ["FULL", "UDEC"]
    assert plot.svg("iid").startswith("<svg")
    plot.write(tmp_path)
    assert {path.suffix for path in tmp_path.glob("quality_epsilon.*")} == {".png", ".pdf", ".csv"}
