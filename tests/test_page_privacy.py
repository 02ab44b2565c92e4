"""What the page says of privacy."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cell

from fedlight.privacy.account import Account
from fedlight.reporting.page import write_report

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
    promised = {row["epsilon"]: row for row in table("privacy")}
    assert promised.keys() == {str(stated), "inf"}
    assert promised[str(stated)]["noise"] == "2.0"
    assert [float(row["epsilon"]) for row in table("epsilon_rounds")] == pytest.approx(
        [Account(2, 1, 1e-5).epsilon(1), stated]
    )
    assert [(row["sees"], row["auc"]) for row in table("attacks")] == [("released model", "0.9")]
    assert len(table("roc")) == 3
    page = (tmp_path / "report" / "index.html").read_text()
    for part in ("what is promised", "epsilon over rounds", "what an attacker finds", "ROC of the attacks"):
        assert f"Privacy: {part}" in page
