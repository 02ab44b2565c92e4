"""Class coverage of generated images, and the FID against real images of the client's own classes."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cell
from frechet import frechet
from plausible import write_cell

from fedlight.data import digits
from fedlight.evaluation.extractor import Extractor
from fedlight.evaluation.label_metrics import coverage
from fedlight.experiment.finished import open_cell
from fedlight.reporting.page import write_report
from fedlight.reporting.terminal import print_summary
from fedlight.runtime.seeds import derive_seed

MakeCell = Callable[..., Cell]
SCORED = ["evaluation.samples=80"]


def logits(counts: list[int]) -> torch.Tensor:
    """Logits of images, `counts[i]` of which the classifier assigns to class i."""
    return torch.eye(len(counts)).repeat_interleave(torch.tensor(counts), dim=0)


@pytest.mark.parametrize(
    ("counts", "share", "entropy"),
    [
        ([50] * 10, 1.0, math.log(10)),
        ([500, *[0] * 9], 0.1, 0.0),
        ([250, 250, *[0] * 8], 0.2, math.log(2)),
        ([246, 245, 9, *[0] * 7], 0.2, -2 * 0.491 * math.log(0.491) - 0.018 * math.log(0.018)),
        ([245, 245, 10, *[0] * 7], 0.3, -2 * 0.49 * math.log(0.49) - 0.02 * math.log(0.02)),
    ],
    ids=["even", "one", "two", "two and a few mistakes", "three"],
)
def test_a_class_is_covered_from_a_fifth_of_an_even_share_on(
    counts: list[int], share: float, entropy: float
) -> None:
    covered = coverage(logits(counts))
    assert covered["share"] == pytest.approx(share)
    assert covered["entropy"] == pytest.approx(entropy, abs=1e-4)


def test_real_digits_cover_their_own_classes(digits_classifier: Extractor) -> None:
    test = digits.load().test
    for classes in (1, 2, 5, 10):
        seen = coverage(digits_classifier(test.pixels[test.labels < classes]).logits)
        assert seen["share"] == pytest.approx(classes / 10)
        assert seen["entropy"] == pytest.approx(math.log(classes), abs=0.15)


def test_each_client_is_compared_with_real_images_of_its_seen_classes(
    cell: MakeCell, digits_classifier: Extractor
) -> None:
    made = cell("method=UDEC", "partition=shards", "partition.classes=2", *SCORED)
    fid, test = made.result["fid"], digits.load().test
    values = digits_classifier(test.pixels).values
    finished, shares = open_cell(made.folder), []
    for client, own in enumerate(fid["own"]["per_client"]):
        seen_classes = {
            int(row["label"])
            for row in made.rows("partition.csv")
            if int(row["client"]) == client and int(row["count"])
        }
        assert len(seen_classes) == 2
        images = finished.sample(client, 80, seed=derive_seed(2023, "sample", 2, client))
        seen = digits_classifier(images)
        expected = frechet(seen.values, values[np.isin(test.labels, list(seen_classes))])
        assert own == pytest.approx(expected, rel=1e-5)
        predicted = seen.logits.argmax(dim=1).tolist()
        shares.append(sum(predicted.count(label) >= 80 / 50 for label in range(10)) / 10)
    assert fid["own"]["value"] == pytest.approx(np.mean(fid["own"]["per_client"]))
    assert fid["coverage"]["share"] == pytest.approx(np.mean(shares))


def test_too_few_real_images_of_the_seen_classes_give_no_own_fid(cell: MakeCell) -> None:
    options = ["evaluation.reference=train", "data.limit=120", "partition=label_skew"]
    made = cell("method=LOCAL", "rounds=0", *options, *SCORED)
    own = made.result["fid"]["own"]
    labels = digits.load().train.labels[:120]
    for client, value in enumerate(own["per_client"]):
        seen_classes = {
            int(row["label"])
            for row in made.rows("partition.csv")
            if int(row["client"]) == client and int(row["count"])
        }
        assert (value is None) == (np.isin(labels, list(seen_classes)).sum() <= 64)
    assert {value is None for value in own["per_client"]} == {True, False}


def test_the_global_model_has_coverage_and_no_own_fid(cell: MakeCell) -> None:
    fid = cell("rounds=0", *SCORED).result["fid"]
    assert fid["own"] is None
    assert fid["coverage"].keys() == {"share", "entropy"}


@pytest.mark.slow
def test_report_and_terminal_show_coverage_and_read_cells_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    old = write_cell(sweep, "LOCAL") / "result.json"
    result = json.loads(old.read_text())
    del result["fid"]["coverage"], result["fid"]["own"]  # as an earlier version wrote it
    old.write_text(json.dumps(result))
    new = write_cell(sweep, "UDEC") / "result.json"
    result = json.loads(new.read_text())
    result["fid"]["coverage"] = {"share": 0.7, "entropy": 1.9459101}
    result["fid"]["own"] = {"value": 12.345, "per_client": [12.0, 12.69, None, None, None]}
    new.write_text(json.dumps(result))
    print_summary(sweep)
    lines = capsys.readouterr().out.splitlines()
    (shown,) = (line for line in lines if "UDEC" in line)
    (before,) = (line for line in lines if "LOCAL" in line)
    assert "0.700" in shown
    assert "12.35" in shown or "12.34" in shown
    assert "–" in before
    write_report([sweep], tmp_path / "report")
    for table in ("table.csv", "cells.csv"):
        with (tmp_path / "report" / table).open(newline="") as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
        assert float(rows["UDEC"]["coverage"]) == 0.7
        assert float(rows["UDEC"]["coverage_entropy"]) == 1.9459101
        assert float(rows["UDEC"]["own_fid"]) == 12.345
        assert rows["LOCAL"]["coverage"] == rows["LOCAL"]["own_fid"] == ""
    assert "1.95" in (tmp_path / "report" / "index.html").read_text()
