"""A finished cell that goes on to more rounds is, bit by bit, a cell that had them from the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Cell, invoke, slow

from fedlight import extend
from fedlight.federation import client as client_module
from fedlight.federation.checkpoint import ClientMemory, ServerCheckpoint
from fedlight.federation.messages import State

Command = Callable[..., int]

TINY = [*SMALL, "data.limit=60", "clients=3", "evaluation.grid=2"]
SETTINGS = [
    ["method=UDEC", "evaluation.every=2"],
    ["method=FULL", "algorithm=scaffold", "fraction=0.7", "federation.dropout=0.3"],
    ["method=USPLIT", "transform=stc", "algorithm=fedadam"],
    *slow(
        ["method=LOCAL", "optimizer.warmup=3"],
        ["method=CENTRAL", "model.ema_decay=0.9"],
        ["method=ULATDEC_WARM", "method.warm_start=2", "transform=int8"],
        ["method=UDEC", "method.keep_optimizer=true", "fraction=0.7"],
        ["method=FULL", "privacy=client", "privacy.clip_quantile=0.5", "privacy.noise=0.3"],
    ),
]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Cell and round of each local update that is trained."""
    seen = []
    original = client_module.local_update

    def counted(broadcast: Any, memory: Any, setup: Any) -> Any:
        seen.append((broadcast.cell, broadcast.round))
        return original(broadcast, memory, setup)

    monkeypatch.setattr("fedlight.federation.site.local_update", counted)
    return seen


def folder_of(sweep: str, rounds: int) -> Path:
    (path,) = Path("runs", sweep).glob(f"*-R{rounds}-*")
    return path


def server_state(cell: Path) -> tuple[int, dict[str, Any], dict[str, State]]:
    """The last stored state of the server, without times and names."""
    round_, header, groups = next(ServerCheckpoint(cell / "checkpoint", cell.name, repair=False).read())
    for entry in header["history"]["rounds"]:
        del entry["row"]["seconds"]
    del header["history"]["seconds"]
    header["history"].pop("parent", None)
    return round_, header, groups


def assert_equal_groups(one: dict[str, State], other: dict[str, State]) -> None:
    assert one.keys() == other.keys()
    for group in one:
        assert one[group].keys() == other[group].keys()
        for name in one[group]:
            assert torch.equal(one[group][name], other[group][name]), (group, name)


def assert_same_cell(one: Path, other: Path) -> None:
    """Two folders hold the same cell, but for times."""
    assert one.name == other.name
    first, second = Cell(one), Cell(other)
    for key in ("state_sha256", "client_sha256", "exchange", "train_loss", "fid", "privacy", "stopped"):
        assert first.result.get(key) == second.result.get(key), key
    assert (one / "ledger.csv").read_bytes() == (other / "ledger.csv").read_bytes()
    rows = [[{**row, "seconds": ""} for row in cell.rows("rounds.csv")] for cell in (first, second)]
    assert rows[0] == rows[1]
    pictures = [
        {path.name: path.read_bytes() for path in cell.glob("samples/*.png")} for cell in (one, other)
    ]
    assert pictures[0] == pictures[1]
    states = [server_state(cell) for cell in (one, other)]
    assert states[0][:2] == states[1][:2]
    assert_equal_groups(states[0][2], states[1][2])
    for client, round_ in states[0][1]["met"]:
        memories = [
            ClientMemory(cell / "checkpoint" / "clients", cell.name, repair=False) for cell in (one, other)
        ]
        if (one / "checkpoint" / "clients").is_dir():
            assert_equal_groups(*(memory.read(client, round_) for memory in memories))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_an_extended_cell_is_the_long_one(
    command: Command, settings: list[str], trained: list[tuple[str, int]]
) -> None:
    assert command(*TINY, *settings, "rounds=3", "name=short") == 0
    trained.clear()
    assert invoke(str(folder_of("short", 3)), "rounds=4", main=extend.main) == 0
    assert {round_ for _, round_ in trained} <= {4}
    longer = folder_of("short", 4)
    assert command(*TINY, *settings, "rounds=4", "name=long") == 0
    assert_same_cell(longer, folder_of("long", 4))
    result, parent = Cell(longer).result, Cell(folder_of("short", 3)).result
    assert result["parent"]["cell"] == parent["cell"]
    assert result["parent"]["rounds"] == 3
    assert 0 < result["parent"]["seconds"] <= parent["seconds"]["total"]
    assert result["seconds"]["total"] > result["parent"]["seconds"]


def test_a_grid_over_rounds_trains_the_longest_alone(
    command: Command, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, "method=UDEC", "evaluation.every=2"]
    grid = ["-m", *settings, "rounds=3,1,2", "name=grid"]
    assert command("--dry", *grid) == 0
    assert capsys.readouterr().out.count("from round") == 2
    assert command(*grid) == 0
    assert len(trained) == 3 * 3  # clients, rounds
    assert Cell(folder_of("grid", 3)).result["parent"]["cell"] == folder_of("grid", 2).name
    for rounds in (2, 3):
        assert (
            command(*TINY, "method=UDEC", f"rounds={rounds}", "evaluation.every=2", f"name=one{rounds}") == 0
        )
        assert_same_cell(folder_of("grid", rounds), folder_of(f"one{rounds}", rounds))
