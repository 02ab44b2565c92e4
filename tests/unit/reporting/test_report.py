"""The report: what it reads, what it prints, and that both agree."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from plausible import METHODS, read_result, write_cell, write_grid
from report_page import Page, run_report

from fedlight.reporting.comparison import make_comparisons
from fedlight.reporting.exchange_figure import frontier, quality_exchange
from fedlight.reporting.paper import beside_paper
from fedlight.reporting.summaries import by_cell, summaries
from fedlight.reporting.terminal import print_summary
from fedlight.runs.plan import Launch, PlannedCell
from fedlight.runs.reader import flatten
from fedlight.runs.status import read_sweep
from fedlight.runtime.process_record import describe_this_process

GROUPS = ("method", "partition", "data")
LATEX = shutil.which("pdflatex")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latex_records(path: Path) -> list[dict[str, str]]:
    """The rows of a tabular, with its mark-up undone."""
    lines = [line.removesuffix(r"\\").split(" & ") for line in path.read_text().splitlines() if " & " in line]
    plain = [[_unmark(field.strip()) for field in line] for line in lines]
    return [dict(zip(plain[0], line, strict=True)) for line in plain[1:]]


def _unmark(text: str) -> str:
    text = re.sub(r"\\textbf\{(.*)\}", r"\1", text).replace(r"$\pm$", "±").replace("$-$", "−")
    return text.replace("--", "–").replace(r"\%", "%").replace(r"\_", "_")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "made"


@pytest.mark.slow
def test_page_csv_and_latex_agree_with_the_results_to_the_printed_digit(sweep: Path) -> None:
    seeds = [1, 2, 3]
    axes = {"method": METHODS[:4], "clients": [2, 5], "partition": ["iid", "label_skew"], "seed": seeds}
    cells = [read_result(folder) for folder in write_grid(sweep, **axes)]
    assert run_report(sweep) == 0
    out = sweep / "report"
    printed, typeset, raw = (
        Page(out / "index.html").records("table"),
        latex_records(out / "table.tex"),
        rows(out / "table.csv"),
    )
    assert len(printed) == len(typeset) == len(raw) == 16
    for page, tex, line in zip(printed, typeset, raw, strict=True):
        assert page == tex
        group = [
            cell
            for cell in cells
            if (cell["partition"], str(cell["clients"]), cell["method"])
            == (line["partition"], line["clients"], line["method"])
        ]
        assert len(group) == len(seeds)
        fids = [cell["fid"]["value"] for cell in group]
        assert float(line["fid"]) == pytest.approx(mean(fids), rel=1e-12)
        assert float(line["fid_std"]) == pytest.approx(stdev(fids), rel=1e-12)
        assert page["FID"] == f"{mean(fids):.2f} ± {stdev(fids):.2f}"
        assert page["KID"] == f"{mean(cell['fid']['kid'] for cell in group):.4f}"
        assert page["parameters"] == f"{group[0]['exchange']['params_total']:,}"
        saved = group[0]["exchange"]["reduction"]
        assert page["vs FULL"] == (f"−{saved:.1%}".replace("%", " %") if saved else "–")
        assert page["loss"] == f"{mean(cell['train_loss'] for cell in group):.4f}"

    for cell, line in zip(
        sorted(cells, key=lambda cell: cell["cell"]),
        sorted(rows(out / "cells.csv"), key=lambda line: line["cell"]),
        strict=True,
    ):
        assert float(line["fid"]) == cell["fid"]["value"]
        assert int(line["bytes"]) == cell["exchange"]["bytes_total"]


@pytest.mark.slow
def test_with_one_seed_the_spread_is_over_clients(sweep: Path) -> None:
    fid = read_result(write_cell(sweep, "UDEC"))["fid"]
    run_report(sweep)
    (line,) = Page(sweep / "report" / "index.html").records("table")
    assert line["FID"] == f"{fid['value']:.2f} ± {fid['std']:.2f}"
    assert line["± over"] == "5 clients"


def write_scored(sweep: Path, method: str, fids: list[float]) -> None:
    """Writes a cell for each FID, of seeds 0, 1 and so on."""
    for seed, value in enumerate(fids):
        path = write_cell(sweep, method, 2, seed=seed, picture=False) / "result.json"
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"fid": result["fid"] | {"value": value}}))


def marked(sweep: Path) -> tuple[set[str], set[str], str]:
    """The marked methods of the only place: in the table by method, in the one in full; and the note."""
    (comparison,) = make_comparisons(read_sweep(sweep))
    by_method, full = summaries(comparison, "")
    (row,) = by_method.rows
    names = {column for column, field in zip(by_method.columns, row, strict=True) if field.best}
    return names, {line["method"] for line in full.data if line["best"]}, by_method.note


@pytest.mark.parametrize(
    ("fids", "expected"),
    [
        ({"FULL": [10, 12, 11], "UDEC": [20, 22, 22]}, {"FULL"}),
        ({"FULL": [10, 12], "UDEC": [20, 22.1]}, {"FULL"}),  # seeds that move both alike are paired
        ({"FULL": [10, 12], "UDEC": [22, 20]}, set()),  # 10 ± 2.8 apart, of two seeds
        ({"FULL": [10, 12, 11], "UDEC": [12, 11, 11], "USPLIT": [30, 32, 31.1]}, {"FULL", "UDEC"}),
        ({"FULL": [10, 12, 11], "UDEC": [12, 11, 11]}, set()),  # all are level
        ({"FULL": [10, 12, 11], "UDEC": [20]}, set()),  # of one seed the spread is not known
        ({"FULL": [10, 12], "CENTRAL": [20, 22], "LOCAL": [30, 32]}, set()),  # references do not compete
        ({"FULL": [20, 22], "UDEC": [40, 42.1], "CENTRAL": [1, 2]}, {"FULL"}),
    ],
)
def test_the_best_method_and_those_level_with_it_are_marked(
    sweep: Path, fids: dict[str, list[float]], expected: set[str]
) -> None:
    for method, values in fids.items():
        write_scored(sweep, method, values)
    by_method, full, note = marked(sweep)
    assert by_method == full == expected
    assert "level with it, whose paired difference" in note


def test_intervals_are_in_csv_latex_and_terminal(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, fids in {"FULL": [10, 12, 11], "UDEC": [20, 22, 22]}.items():
        write_scored(sweep, method, fids)
    (comparison,) = make_comparisons(read_sweep(sweep))
    by_method, full = summaries(comparison, "")
    low, high = 11 - 2.484, 11 + 2.484  # t = 4.303, standard deviation 1, three seeds
    for line in (by_method.data[0]["FULL_low"], full.data[0]["fid_low"]):
        assert line == pytest.approx(low, abs=1e-3)
    for line in (by_method.data[0]["FULL_high"], full.data[0]["fid_high"]):
        assert line == pytest.approx(high, abs=1e-3)
    assert r"\textbf{11.00 $\pm$ 1.00} [8.52, 13.48]" in by_method.latex()
    assert r"\textbf{11.00 $\pm$ 1.00} & 3 seeds & [8.52, 13.48]" in full.latex()
    print_summary(sweep)
    printed = capsys.readouterr().out
    assert "11.00 ± 1.00 [8.52, 13.48]" in printed
    assert "FULL is best" in printed


def test_columns_that_are_the_same_in_every_row_are_named(sweep: Path) -> None:
    for method in ("FULL", "UDEC", "CENTRAL"):
        for clients in (2, 5):
            write_cell(sweep, method, clients, picture=False)
    (comparison,) = make_comparisons(read_sweep(sweep))
    by_method, full = summaries(comparison, "")
    assert by_method.constant == {"partition": "iid"}  # and not CENTRAL, a method
    assert full.constant.keys() >= {"partition", "IS", "status"}
    assert full.constant.keys().isdisjoint({"clients", "method", "FID", "parameters"})
    assert replace(full, rows=full.rows[:1]).constant == {}


def test_with_one_seed_nothing_is_marked_and_the_note_says_so(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("FULL", "UDEC", "CENTRAL"):
        write_cell(sweep, method, 2, picture=False)
    by_method, full, note = marked(sweep)
    assert by_method == full == set()
    assert note.startswith("Lower is better. One seed: nothing is marked")
    print_summary(sweep)
    assert "one seed" in capsys.readouterr().out


def test_missing_failed_interrupted_and_corrupt_cells_are_shown_as_such(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cell(sweep, "FULL", 2)
    write_cell(sweep, "FULL", 5)
    write_cell(sweep, "UDEC", 2, status="failed", error="the loss of client 1 became nan in round 3")
    killed = write_cell(sweep, "ULATDEC", 2)
    (killed / "result.json").unlink()
    corrupt = write_cell(sweep, "USPLIT", 2)
    (corrupt / "result.json").write_text('{"schema": 1, "status": "comp')
    foreign = write_cell(sweep, "LOCAL", 2)
    (foreign / "result.json").write_text('{"schema": 2}')
    torn = write_cell(sweep, "UDEC", 5)
    (torn / "rounds.csv").write_bytes(b"\x00\xff")
    (torn / "config.yaml").write_text("a: [")
    assert run_report(sweep) == 0
    assert "3 done, 2 corrupt, 1 failed, 1 interrupted" in capsys.readouterr().out
    page = Page(sweep / "report" / "index.html")
    by_place = {(line["method"], line["clients"]): line for line in page.records("table")}
    assert by_place["UDEC", "2"]["FID"] == by_place["UDEC", "2"]["status"] == "failed"
    assert by_place["ULATDEC", "2"]["FID"] == "interrupted"
    assert by_place["USPLIT", "2"]["FID"] == by_place["LOCAL", "2"]["FID"] == "corrupt"
    assert by_place["USPLIT", "5"]["FID"] == "missing"
    for folder, reason in (
        (killed, "4 of 4 rounds done"),
        (corrupt, "result.json cannot be read"),
        (foreign, "schema"),
        (torn, "rounds.csv cannot be read"),
        (torn, "config.yaml cannot be read"),
    ):
        assert re.search(f"{folder.name}.*?{reason}", page.text, re.DOTALL), (folder, reason)
    assert "the loss of client 1 became nan in round 3" in page.text


@pytest.mark.slow
def test_planned_cells_that_have_not_begun_are_missing(sweep: Path) -> None:
    rates = (0.1, 0.01)
    planned = {
        folder.name: PlannedCell([], 4, config=flatten(yaml.safe_load((folder / "config.yaml").read_text())))
        for rate in rates
        for clients in (2, 5, 10)
        for folder in [write_cell(sweep, "FULL", clients, sections={"optimizer": {"lr": rate}})]
    }
    done, *missing = planned
    for cell in missing:
        shutil.rmtree(sweep / cell)
    command = ["-m", "clients=2,5,10", "optimizer.lr=0.1,0.01"]
    Launch(command, "", replace(describe_this_process(), started="1"), planned).write(sweep)
    run_report(sweep)
    page = Page(sweep / "report" / "index.html")
    states = {(line["optimizer.lr"], line["clients"]): line["status"] for line in page.records("table")}
    places = [(str(rate), str(clients)) for rate in rates for clients in (2, 5, 10)]
    assert states == dict.fromkeys(places, "missing") | {("0.1", "2"): "done"}
    states = {line["cell"]: line["status"] for line in rows(sweep / "report" / "cells.csv")}
    assert states == {done: "done", **dict.fromkeys(missing, "missing")}
    assert "python -m fedlight.run -m clients=2,5,10 optimizer.lr=0.1,0.01" in page.text


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "empty folder"])
def test_a_folder_without_cells_is_refused_in_one_line(
    sweep: Path, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    if there:
        sweep.mkdir(parents=True)
    assert run_report(sweep) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("no cell here" if there else "no such folder") in line
    assert not (sweep / "report").exists()


@pytest.mark.slow
def test_the_sample_grids_of_a_place_are_one_picture(sweep: Path) -> None:
    for method, clients in (("FULL", 2), ("UDEC", 2), ("LOCAL", 2), ("FULL", 5)):
        write_cell(sweep, method, clients)
    assert run_report(sweep) == 0
    (sheet,) = (sweep / "report").glob("samples_*.png")
    assert sheet.name == "samples_iid_2_clients.png"
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("L")).astype(float)
    (upper, lower), width = np.array_split(pixels, 2), pixels.shape[1] // 2
    quarters = upper[:, :width], upper[:, width:], lower[:, :width], lower[:, width:]
    assert [quarter.std() > 20 for quarter in quarters] == [True, True, True, False]


@pytest.mark.slow
def test_cells_of_different_data_sets_and_extractors_are_not_compared(sweep: Path) -> None:
    other = sweep.with_name("other")
    write_cell(sweep, data="digits")
    write_cell(sweep, data="digits", extractor="inception")
    write_cell(other, data="fmnist", extractor_sha256="0123456789")
    write_cell(other, "UDEC", data="fmnist", extractor_sha256="abcdef0123")
    other.with_name("empty").mkdir()
    out = sweep.with_name("both")
    assert run_report(sweep, other, other.with_name("empty"), "--out", out) == 0
    classifiers = ("fmnist_classifier-01234567", "fmnist_classifier-abcdef01")
    for name in ("digits_classifier", "digits_inception", *classifiers):
        (line,) = rows(out / f"{name}_table.csv")
        assert f"{line['data']}_{line['extractor']}" == name
    assert not (out / "table.csv").exists()
    assert "empty holds no cell" in (out / "index.html").read_text()


@pytest.mark.slow
def test_any_other_key_that_varies_is_a_setting_and_is_not_averaged(sweep: Path) -> None:
    for rate in (0.1, 0.01):
        for seed in (1, 2):
            write_cell(
                sweep,
                seed=seed,
                sections={"optimizer": {"lr": rate}, "trainer": {"threads": seed, "workers": seed}},
            )
    run_report(sweep)
    lines = rows(sweep / "report" / "table.csv")
    assert [line["setting"] for line in lines] == ["optimizer.lr=0.01", "optimizer.lr=0.1"]
    assert [line["optimizer.lr"] for line in lines] == ["0.01", "0.1"]
    assert all(line["fid_std_over"] == "2 seeds" for line in lines)


@pytest.mark.slow
def test_every_swept_key_is_a_column_by_which_cells_differ(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rate, model, keep, seed in product((0.1, 0.02), ("tiny", "paper"), (True, False), (7, 8)):
        own = {"method": {"keep_optimizer": keep}, "partition": {"seed": seed, "deal": {"seed": seed}}}
        write_cell(sweep, sections={"optimizer": {"lr": rate}, "model": {"name": model}, **own})
    swept = {"optimizer.lr", "model", "method.keep_optimizer", "partition.seed"}
    print_summary(sweep)
    by_cell, _ = capsys.readouterr().out.split("└", 1)  # the means over seeds follow
    head, *body = [line for line in by_cell.splitlines() if line[:1] in ("┃", "│")]
    assert swept <= set(re.findall(r"[\w.]+", head))
    assert len({tuple(line.split("│")[1:5]) for line in body}) == 16
    run_report(sweep)
    lines = rows(sweep / "report" / "cells.csv")
    page = Page(sweep / "report" / "index.html")
    assert len({tuple(line[key] for key in swept) for line in lines}) == 16
    for columns in (lines[0].keys(), page.tables["cells"][0]):
        assert swept <= set(columns)
        assert "partition.deal.seed" not in columns
    for table in (rows(sweep / "report" / "table.csv"), page.records("table"), page.records("fid")):
        settings = ("optimizer.lr", "model", "method.keep_optimizer")
        assert len({tuple(line[key] for key in settings) for line in table}) == 8
        assert "partition.seed" not in table[0]


@pytest.mark.slow
def test_a_swept_key_is_a_column_even_if_it_varies_with_another(sweep: Path) -> None:
    cells = {}
    for rate, epochs, data in ((0.1, 2, "digits"), (0.01, 5, "digits"), (0.1, 2, "fmnist")):
        made = write_cell(sweep, data=data, sections={"optimizer": {"lr": rate}, "epochs": epochs})
        typed = [f"optimizer.lr={rate}", f"epochs={epochs}", f"data={data}"]
        cells[made.name] = PlannedCell(typed, rounds=2)
    Launch(["-m"], str(sweep), describe_this_process(), cells).write(sweep)
    run_report(sweep)
    report = sweep / "report"
    for name, count in (("digits_classifier", 2), ("fmnist_classifier", 1)):
        lines = rows(report / f"{name}_cells.csv")
        assert len({(line["optimizer.lr"], line["epochs"], line["data"]) for line in lines}) == count
    lines = rows(report / "digits_classifier_table.csv")
    assert {(line["optimizer.lr"], line["epochs"]) for line in lines} == {("0.1", "2"), ("0.01", "5")}


@pytest.mark.slow
def test_settings_are_sorted_as_numbers(sweep: Path) -> None:
    for epochs in (10, 2, 5):
        write_cell(sweep, sections={"epochs": epochs})
    run_report(sweep)
    assert [line["epochs"] for line in rows(sweep / "report" / "table.csv")] == ["2", "5", "10"]


@pytest.mark.slow
def test_methods_with_different_rounds_are_in_different_rows(sweep: Path) -> None:
    write_cell(sweep, "FULL", rounds=4)
    write_cell(sweep, "UDEC", rounds=2)
    write_cell(sweep, "FULL", rounds=4, partition="label_skew", sections={"partition": {"beta": 0.5}})
    run_report(sweep)
    lines = rows(sweep / "report" / "table.csv")
    assert {(line["setting"], line["method"]) for line in lines} == {
        ("rounds=4", "FULL"),
        ("rounds=2", "UDEC"),
    }
    page = Page(sweep / "report" / "index.html").records("fid")
    assert [line["FULL"] for line in page if line["rounds"] == "2"] == ["–"]


@pytest.mark.slow
def test_a_cell_in_two_folders_counts_once(sweep: Path) -> None:
    folder = write_cell(sweep)
    shutil.copytree(folder, sweep.with_name("copy") / folder.name)
    run_report(sweep, sweep.with_name("copy"))
    (line,) = rows(sweep / "report" / "cells.csv")
    assert line["sweep"] == "made"


@pytest.mark.slow
def test_central_is_in_every_row_and_listed_once(sweep: Path) -> None:
    central = read_result(write_cell(sweep, "CENTRAL", 2))["fid"]["value"]
    for clients in (2, 5):
        write_cell(sweep, "FULL", clients)
    run_report(sweep)
    out = sweep / "report"
    assert [float(line["CENTRAL"]) for line in rows(out / "fid.csv")] == [central, central]
    assert [line["method"] for line in rows(out / "table.csv")].count("CENTRAL") == 1


@pytest.mark.slow
def test_the_published_numbers_are_beside_those_of_the_same_cells(sweep: Path) -> None:
    paper = {"data": {"batch_size": 128}, "model": {"name": "paper"}, "epochs": 5, "optimizer": {"lr": 1e-4}}
    for method in ("UDEC", "ULATDEC"):
        for partition in ("iid", "label_skew"):
            write_cell(sweep, method, data="fmnist", partition=partition, rounds=15, sections=paper)
    run_report(sweep)
    page = Page(sweep / "report" / "index.html")
    lines = {(line["method"], line["partition"]): line for line in page.records("paper")}
    assert (lines["UDEC", "iid"]["paper"], lines["UDEC", "iid"]["order, paper"]) == ("47.9", "1")
    assert lines["ULATDEC", "label_skew"]["order, paper"] == "4"
    assert sorted(lines[key]["order, here"] for key in lines if lines[key]["this sweep"] != "missing") == [
        *"1234"
    ]
    assert lines["CENTRAL", "iid"]["this sweep"] == "missing"
    assert "1,000 samples" in page.text
    assert "departs" not in page.text


def test_without_scores_there_is_no_figure_or_table_of_quality(sweep: Path) -> None:
    write_cell(sweep, extractor=None)
    run_report(sweep)
    names = {path.name for path in (sweep / "report").iterdir()}
    assert not [name for name in names if "fid" in name or "quality" in name]
    assert {"table.csv", "train_loss_rounds.png", "exchange_rounds.pdf", "partitions.csv"} <= names


@pytest.mark.slow
def test_every_figure_is_written_as_png_pdf_and_csv(sweep: Path) -> None:
    list(write_grid(sweep, method=METHODS, clients=[2, 5]))
    run_report(sweep)
    out = sweep / "report"
    figures = {path.stem for path in out.glob("*.png") if not path.stem.startswith("samples_")}
    assert figures == {
        *("quality_exchange", "budget", "fid_seconds", "fid_rounds", "client_spread", "train_loss_rounds"),
        *("exchange_rounds", "partitions"),
    }
    for figure in figures:
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert rows(out / f"{figure}.csv")


@pytest.mark.slow
def test_transforms_share_a_panel_of_quality_against_exchange(sweep: Path) -> None:
    """And its frontier is what nothing beats for as few bytes."""
    for method, name in product(("FULL", "UDEC"), (None, "int8", "sign")):
        sections = {"transform": {"name": name, "up": [{"_target_": name}]}} if name else {}
        for rate in (0.1, 0.2):
            write_cell(sweep, method, sections={**sections, "optimizer": {"lr": rate}})
    run_report(sweep)
    points = rows(sweep / "report" / "quality_exchange.csv")
    assert {row["panel"] for row in points} == {"iid, optimizer.lr=0.1", "iid, optimizer.lr=0.2"}
    assert {row["transform"] for row in points} == {"none", "int8", "sign"}
    assert len(points) == 12
    points = pd.DataFrame({"bytes": [5, 1, 3, 3, 9, 7], "fid": [2.0, 8.0, 4.0, 3.0, 2.0, 1.0]})
    kept = [list(point) for point in points.to_numpy().tolist()]
    beaten = [p for p in kept if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in kept)]
    assert frontier(points).to_numpy().tolist() == sorted(p for p in kept if p not in beaten)


def test_fine_tuned_cells_share_a_panel_whatever_else_differs(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {"model": {"name": "paper", "unet": {"dim": 16}}},
        {"finetuning": {"name": "full"}, "model": {"name": "pretrained"}},
    ]
    for rank, rate in ((4, 0.01), (4, 0.02), ([1, 4], 0.01)):
        adapters = {"name": "lora", "rank": rank, "train": "both"}
        transform = {"transform": {"name": "best", "up": [{"_target_": "best"}]}} if rate == 0.02 else {}
        tuned = {"finetuning": adapters, "model": {"name": "pretrained"}, "optimizer": {"lr": rate}}
        settings.append({**tuned, **transform})
    settings.append({**settings[3], "algorithm": {"name": "flexlora"}})
    for sections in settings:
        write_cell(tmp_path / "made", picture=False, sections=sections)
    (comparison,) = make_comparisons(read_sweep(tmp_path / "made"))
    plot = quality_exchange(comparison, "")
    assert plot.panels == ["iid"]
    assert sorted(plot.data["kind"]) == [
        "all weights",
        "from scratch",
        "rank 4",
        "rank 4, best",
        "rank 4, flexlora, best",
        "rank [1, 4]",
    ]
    _, curves = plot.view("iid")
    assert len(curves) == len(settings)


def test_a_group_that_a_cell_does_not_use_is_none_in_every_table(sweep: Path) -> None:
    own = {"data": {"limit": 60}, "model": {"name": "paper"}}
    for algorithm in ({}, {"algorithm": {"name": "fedprox", "mu": 0.1}}):
        write_cell(sweep, "UDEC", data="fmnist", picture=False, sections={**own, **algorithm})
    cells = read_sweep(sweep)
    (comparison,) = make_comparisons(cells)
    for table in (*summaries(comparison, ""), by_cell(cells)):
        shown = table.columns.index("algorithm")
        assert {row[shown].text for row in table.rows} == {"none", "fedprox"}
    assert {place.setting for place in comparison.places} == {"algorithm.name=none", "algorithm.name=fedprox"}
    published = beside_paper(comparison, "")
    assert published
    assert "data.limit=60 instead of none" in published.note


@pytest.mark.slow
@pytest.mark.skipif(LATEX is None, reason="not installed: apt-get install texlive-latex-recommended")
def test_latex_compiles(sweep: Path, tmp_path: Path) -> None:
    list(write_grid(sweep, method=METHODS, clients=[2, 5], partition=["iid", "label_skew"]))
    write_cell(sweep, "my_50%_#1&2", 5)
    run_report(sweep)
    lines = [r"\documentclass{article}", r"\usepackage{booktabs,graphicx}", r"\begin{document}"]
    tables = list((sweep / "report").glob("*.tex"))
    assert tables
    for path in tables:
        lines.append(rf"\resizebox{{\textwidth}}{{!}}{{\input{{{path}}}}}\par")
    document = tmp_path / "all.tex"
    document.write_text("\n".join([*lines, r"\end{document}"]))
    done = subprocess.run(
        [str(LATEX), "-interaction=nonstopmode", "-halt-on-error", document.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
def test_five_hundred_cells_make_a_small_page(sweep: Path) -> None:
    axes: dict[str, Any] = {"method": METHODS[:5], "clients": [2, 5, 10, 20, 50], "rounds": [15]}
    axes |= {"partition": ["iid", "label_skew"], "data": ["digits", "fmnist"], "seed": [1, 2, 3, 4, 5]}
    assert len(list(write_grid(sweep, **axes))) == 500
    assert run_report(sweep) == 0
    assert (sweep / "report" / "index.html").stat().st_size < 20e6


@pytest.mark.slow
def test_the_report_of_cells_that_were_run(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["-m", "method=FULL,UDEC", "clients=2,3", "data.limit=60", "rounds=2", "epochs=1", "logger=none"]
    assert command(*grid, "evaluation.steps=2", "evaluation.grid=4", "evaluation.samples=80") == 0
    assert "python -m fedlight.report runs/default" in capsys.readouterr().out
    assert run_report("runs/default") == 0
    page = Page(tmp_path / "runs/default/report/index.html")
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/default/*/result.json")]
    lines = {(line["method"], line["clients"]): line for line in page.records("table")}
    assert len(results) == len(lines) == 4
    for result in results:
        line = lines[result["method"], str(result["clients"])]
        assert line["parameters"] == f"{result['exchange']['params_total']:,}"
        assert line["loss"] == f"{result['train_loss']:.4f}"
        assert line["FID"].startswith(f"{result['fid']['value']:.2f}")
        assert result["machine"]["processor"] in page.text
    assert "python -m fedlight.run -m method=FULL,UDEC clients=2,3" in page.text
    assert "UDEC, round 2" in page.text
    assert "data.limit: 60" in page.text
    for folder in (os.environ["FEDLIGHT_CACHE"], str(Path.home()), str(tmp_path)):
        assert folder not in page.text


@pytest.mark.slow
def test_the_report_loads_no_torch_and_its_help_nothing_heavy(sweep: Path) -> None:
    write_cell(sweep)
    heavy = "print([m for m in ('torch', 'lightning', 'pandas', 'matplotlib') if m in sys.modules])"
    for arguments, loaded in (["--help"], "[]"), ([str(sweep)], "['pandas', 'matplotlib']"):
        code = f"import sys; sys.argv = ['report', *{arguments}]; from fedlight.report import main\n"
        code += f"try: main()\nfinally: {heavy}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip().endswith(loaded), done.stderr
