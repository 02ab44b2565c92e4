"""Early stopping: a cell ends where what it monitors has stopped to fall, after any kill."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composed import config
from conftest import SMALL, Cell

from fedlight.config import EarlyStoppingConfig
from fedlight.experiment.early_stopping import check_early_stopping, find_stop
from fedlight.experiment.finished import open_cell
from fedlight.experiment.privacy_account import PrivacyAccount
from fedlight.experiment.round_loop import RoundLoop
from fedlight.federation.server import Server
from fedlight.runs.status import DONE, read_cell
from fedlight.runtime.errors import BadInput

STOPPING = ["early_stopping=train_loss", "early_stopping.patience=1", "early_stopping.min_delta=100"]
CELL = [*SMALL, "data.limit=60", "clients=2", "rounds=4", "evaluation.grid=2", *STOPPING]


def rows(*losses: float | None) -> list[dict[str, Any]]:
    return [{"round": number, "fid": None, "train_loss": loss} for number, loss in enumerate(losses, 1)]


def test_patience_counts_rounds_in_a_row_without_a_fall_of_more_than_min_delta() -> None:
    section = EarlyStoppingConfig(monitor="train_loss", patience=2, min_delta=0.1)
    assert find_stop(section, rows(1.0, 0.95, 0.85, 0.8, 0.74)) is None
    assert find_stop(section, rows(1.0, None, 0.95, 0.92)) == (
        "train_loss has not fallen by more than 0.1 in 2 rounds; the best is 1 after round 1"
    )
    assert (
        find_stop(section, rows(1.0, 0.95, 0.8, 0.75, 0.71, 0.1)) is not None
    )  # later rounds change nothing
    assert find_stop(None, rows(1.0, 1.0, 1.0)) is None
    scores = [
        {"round": number, "fid": fid, "train_loss": 0.0} for number, fid in ((1, None), (2, 9.0), (4, 9.0))
    ]
    assert "in 1 evaluations; the best is 9 after round 2" in str(
        find_stop(EarlyStoppingConfig(monitor="fid", patience=1, min_delta=0.0), scores)
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["early_stopping=fid", "evaluation.samples=10"], "set evaluation.every=1 or more"),
        (["early_stopping=fid", "evaluation.every=1"], "and evaluation.samples above 0"),
        (["early_stopping=train_loss", "privacy=client"], "which no client reports under privacy"),
        (
            ["early_stopping=fid", "evaluation.every=1", "evaluation.samples=10", "privacy=client"],
            "scores that do not depend on training images",
        ),
    ],
)
def test_a_value_that_is_never_there_or_private_cannot_stop_a_cell(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        check_early_stopping(config(*overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("early_stopping.patience=0", "early_stopping.patience: input should be greater than or equal to 1"),
        (
            "early_stopping.min_delta=-1",
            "early_stopping.min_delta: input should be greater",
        ),
        ("early_stopping.monitor=kid", "early_stopping.monitor: input should be 'fid' or 'train_loss'"),
        ("+early_stopping.mode=max", "early_stopping.mode is not a key"),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        config("early_stopping=fid", override)


def test_without_the_group_and_with_none_the_configuration_is_the_same() -> None:
    assert config("early_stopping=none").plain() == config().plain()
    assert "early_stopping" not in config().plain()


def test_a_cell_ends_early_and_decides_the_same_after_a_kill(
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command("--dry", *CELL) == 0
    assert capsys.readouterr().out.count("at most") >= 2
    assert command(*CELL, "name=whole") == 0
    (folder,) = tmp_path.glob("runs/whole/*-R4-*")
    result = Cell(folder).result
    assert (result["status"], result["rounds"], result["stopped"]["round"]) == ("completed", 4, 2)
    assert "train_loss has not fallen by more than 100 in 1 rounds" in result["stopped"]["reason"]
    assert len(Cell(folder).rows("rounds.csv")) == 2
    assert (folder / "samples" / "round_002.png").is_file()
    assert open_cell(folder).server.round == 2
    shown = read_cell(folder, None, {})
    assert (shown.state, shown.round) == (DONE, 2)
    assert "stopped early after round 2" in shown.note

    finish_round = Server.finish_round
    with monkeypatch.context() as patch:
        patch.setattr(
            Server, "finish_round", lambda server: interrupt() if server.round else finish_round(server)
        )
        assert command(*CELL, "name=killed") == 130
    assert command(*CELL, "name=killed") == 0
    (killed,) = tmp_path.glob("runs/killed/*-R4-*")
    for key in ("state_sha256", "stopped", "exchange"):
        assert Cell(killed).result[key] == result[key]

    (folder / "result.json").unlink()  # as after a kill between the last round and the result
    monkeypatch.setattr(Server, "finish_round", interrupt)
    assert command(*CELL, "name=whole") == 0
    assert Cell(folder).result["stopped"] == result["stopped"]


def test_a_private_cell_that_stops_by_its_scores_keeps_the_guarantee_of_all_rounds(tmp_path: Path) -> None:
    private = config("privacy=client", "early_stopping=fid", "rounds=10", "clients=20", "fraction=0.5")
    account = PrivacyAccount(private, 1.0, [], private.method, tmp_path)
    result: dict[str, Any] = {}
    loop: Any = SimpleNamespace(
        config=private,
        server=SimpleNamespace(round=3),
        record=SimpleNamespace(result=result),
        privacy_account=account,
        _find_stop=lambda: "why",
    )
    RoundLoop._note_stop(loop)
    assert result["stopped"] == {"round": 3, "reason": "why"}
    assert [result["privacy"]["epsilon"]] == account.epsilons(10)
    assert account.epsilons(10) > account.epsilons(3)


@pytest.mark.slow  # trains the classifier that scores
def test_a_cell_ends_where_its_fid_no_longer_falls(command: Callable[..., int], tmp_path: Path) -> None:
    stopping = ["early_stopping=fid", "early_stopping.patience=1", "early_stopping.min_delta=1e6"]
    scored = ["evaluation.samples=70", "evaluation.every=2", "rounds=6"]
    assert command(*SMALL, "data.limit=60", "clients=2", *scored, *stopping) == 0
    (folder,) = tmp_path.glob("runs/default/*-R6-*")
    result = Cell(folder).result
    assert result["stopped"]["round"] == 4
    assert "in 1 evaluations; the best is" in result["stopped"]["reason"]
    assert result["fid"]["value"] == float(Cell(folder).rows("rounds.csv")[-1]["fid"])


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt
