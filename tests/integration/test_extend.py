"""A finished cell that goes on to more rounds is, bit by bit, a cell that had them from the start."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import config
from conftest import SMALL, Cell, invoke, slow

from fedlight import extend
from fedlight.federation import client as client_module
from fedlight.federation.checkpoint import SERVER, ClientMemory, ServerCheckpoint
from fedlight.federation.messages import State
from fedlight.federation.server import Server
from fedlight.federation.store import Versions
from fedlight.runs.identity import cell_id, write_config

Command = Callable[..., int]

TINY = [*SMALL, "data.limit=60", "clients=3", "evaluation.grid=2"]
SETTINGS = [
    ["method=UDEC", "evaluation.every=2"],
    ["method=FULL", "algorithm=scaffold", "fraction=0.7", "federation.dropout=0.3"],
    ["method=USPLIT", "transform=stc", "algorithm=fedadam"],
    *slow(
        ["method=ULATDEC", "evaluation.every=2", "evaluation.samples=70"],
        ["method=LOCAL", "optimizer.warmup=3"],
        ["method=CENTRAL", "model.ema_decay=0.9"],
        ["method=ULATDEC_WARM", "method.warm_start=2", "transform=int8"],
        ["method=UDEC", "+method.keep_optimizer=true", "fraction=0.7"],
        [
            "method=FULL",
            "privacy=client",
            "privacy.clip_quantile=0.5",
            "privacy.noise=0.01",
            "privacy.clip=0.1",
        ],
    ),
]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Cell and round of each local update that is trained."""
    seen = []
    original = client_module.local_updates

    def counted(group: Any, memories: Any, setup: Any) -> Any:
        seen.extend((broadcast.cell, broadcast.round) for broadcast in group)
        return original(group, memories, setup)

    monkeypatch.setattr("fedlight.federation.site.local_updates", counted)
    return seen


def folder_of(sweep: str, rounds: int) -> Path:
    (path,) = Path("runs", sweep).glob(f"*-R{rounds}-*")
    return path


def server_state(cell: Path) -> tuple[int, dict[str, Any], dict[str, State]]:
    """The last stored state of the server, without names, times, memory and operations."""
    round_, header, groups = next(ServerCheckpoint(cell / "checkpoint", cell.name, repair=False).read())
    for entry in header["history"]["rounds"]:
        del entry["row"]["seconds"]
    for key in ("seconds", "memory", "flops", "parent"):
        header["history"].pop(key, None)
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


def test_a_cell_goes_on_from_a_longer_one_than_it_has_stored_itself(
    command: Command, trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*TINY, "method=UDEC", "name=late"]
    with monkeypatch.context() as patch:
        patch.setattr(Server, "finish_round", stop_after(1))
        assert command(*settings, "rounds=3") == 130
    assert command(*settings, "rounds=2") == 0
    trained.clear()
    assert command(*settings, "rounds=3") == 0
    assert {round_ for _, round_ in trained} == {3}
    assert command(*TINY, "method=UDEC", "name=alone", "rounds=3") == 0
    assert_same_cell(folder_of("late", 3), folder_of("alone", 3))


def stop_after(rounds: int) -> Callable[[Server], Any]:
    """A last step of a round that Ctrl-C ends after so many rounds."""
    original = Server.finish_round

    def finish(server: Server) -> Any:
        if server.round == rounds:
            raise KeyboardInterrupt
        return original(server)

    return finish


# ---- parents from elsewhere


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cell of one round."""
    folder = tmp_path_factory.mktemp("parent")
    assert invoke(*TINY, "method=UDEC", "rounds=1", f"output={folder}", "name=sweep") == 0
    (cell,) = folder.glob("sweep/*-R1-*")
    return cell


@pytest.mark.slow  # a cell of two rounds, and twice one that is ended and goes on
def test_after_a_kill_while_the_rounds_are_taken_over_the_same_command_comes_to_the_same_end(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extended(name: str) -> Path:
        cell = tmp_path / name / parent.name
        shutil.copytree(parent, cell, dirs_exist_ok=True)
        assert invoke(str(cell), "rounds=2", main=extend.main) == 0
        (longer,) = cell.parent.glob("*-R2-*")
        return longer

    quiet = extended("quiet")
    for owner, name, call in ((ClientMemory, "write", 2), (ServerCheckpoint, "write", 1)):
        shutil.copytree(parent, tmp_path / name / str(call) / parent.name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt_at(getattr(owner, name), call))
            assert invoke(str(tmp_path / name / str(call) / parent.name), "rounds=2", main=extend.main) == 130
        assert_same_cell(extended(f"{name}/{call}"), quiet)


def interrupt_at(original: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, which Ctrl-C ends at its n-th call."""
    calls = iter(range(1, number + 1))

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls, number) == number:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    return call


def rewrite(cell: Path, change: Callable[[dict[str, Any], dict[str, State]], None]) -> None:
    """Changes the stored state of the server, and names it by its new hash."""
    stored = Versions(cell / "checkpoint", cell.name, SERVER)
    header, groups = stored.read(stored.find()[1])
    change(header, groups)
    stored.write(1, header, groups)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "holds no state of a server (met": lambda cell: rewrite(cell, lambda h, g: h.update(met="all")),
    "holds no state of a server (harm": lambda cell: rewrite(cell, lambda h, g: h.update(harm=1)),
    "has other tensors in theta": lambda cell: rewrite(cell, lambda h, g: g["theta"].popitem()),
    "of shape (1,), torch.float32, in theta": lambda cell: rewrite(
        cell, lambda h, g: g["theta"].update({name: torch.zeros(1) for name in g["theta"]})
    ),
    "rows that are not those of rounds 1 to 1": lambda cell: rewrite(
        cell, lambda h, g: h["history"]["rounds"][0]["row"].update(round=7)
    ),
    "holds no history of rounds: rounds.0.row.seconds": lambda cell: rewrite(
        cell, lambda h, g: h["history"]["rounds"][0]["row"].update(seconds="long")
    ),
    "no seconds of total": lambda cell: rewrite(cell, lambda h, g: h["history"]["seconds"].pop("total")),
    "names clients or rounds": lambda cell: rewrite(cell, lambda h, g: h.update(met=[[7, 1]])),
    "000001": lambda cell: shutil.rmtree(cell / "checkpoint" / "clients" / "000001"),
    "memory of client 2 does not fit": lambda cell: ClientMemory(
        cell / "checkpoint" / "clients", cell.name
    ).write(2, 1, {"model": {"alien": torch.zeros(1)}}, 0),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_parent_is_named_in_one_line(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    cell = tmp_path / "sweep" / parent.name
    shutil.copytree(parent, cell)
    DAMAGES[message](cell)
    capsys.readouterr()
    assert invoke(str(cell), "rounds=2", main=extend.main) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert message in error


def planned(folder: Path, *overrides: str, **result: Any) -> Path:
    """The folder of a cell that is completed by its files alone."""
    plain = config(*SMALL, f"output={folder}", "name=sweep", "rounds=2", *overrides).plain()
    cell = folder / "sweep" / cell_id(plain)
    cell.mkdir(parents=True)
    write_config(cell / "config.yaml", plain)
    (cell / "result.json").write_text(json.dumps({"status": "completed", **result}))
    return cell


REFUSED = [
    ([], {}, ["trainer.workers=2"], "extend needs rounds=N"),
    ([], {}, ["rounds=many"], "extend needs rounds=N"),
    ([], {}, ["rounds=3,4"], "rounds=3,4: extend takes one value for each key"),
    ([], {}, ["rounds=2"], "rounds=2 must be more than its 2 rounds"),
    ([], {}, ["rounds=3", "seed=4"], "seed=4: seed changes the result"),
    ([], {"status": "failed"}, ["rounds=3"], "the folder holds no completed cell"),
    ([], {"stopped": {"round": 1}}, ["rounds=3"], "early_stopping ended it after round 1"),
    (["rounds=0"], {}, ["rounds=3"], "it has no round to go on from"),
    (["optimizer.decay=cosine"], {}, ["rounds=3"], "depend on their number: optimizer.decay=cosine"),
    (
        ["privacy=client", "privacy.target_epsilon=3"],
        {},
        ["rounds=3"],
        "privacy.target_epsilon=3.0 sets the noise",
    ),
    (
        ["privacy=client", "privacy.secure_noise=true"],
        {},
        ["rounds=3"],
        "privacy.secure_noise=true draws noise",
    ),
    (["algorithm=fedprox", "algorithm._target_=os.system"], {}, ["rounds=3"], "would run os.system"),
]


@pytest.mark.parametrize(
    ("overrides", "result", "typed", "message"), REFUSED, ids=lambda value: str(value)[:40]
)
def test_what_cannot_be_extended_is_refused_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    result: dict[str, Any],
    typed: list[str],
    message: str,
) -> None:
    cell = planned(tmp_path, *overrides, **result)
    assert invoke(str(cell), *typed, main=extend.main) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in cell.parent.iterdir()] == [cell.name]


def test_a_sweep_with_a_cell_that_cannot_be_extended_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [planned(tmp_path, "seed=1"), planned(tmp_path, "seed=2", "optimizer.decay=cosine")]
    assert invoke("-m", str(tmp_path / "sweep"), "rounds=3", main=extend.main) == 2
    error = capsys.readouterr().err
    assert "1 of 2 cells cannot be extended, so none was" in error
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == sorted(c.name for c in cells)


@pytest.mark.slow  # two cells of two rounds, extended one after the other
def test_all_cells_of_a_sweep_are_extended(
    command: Command, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("-m", *TINY, "method=FULL,UDEC", "rounds=1,2", "name=sweep") == 0
    trained.clear()
    assert invoke("-m", "runs/sweep", "rounds=3", "transport=inline", main=extend.main) == 0
    assert len(trained) == 2 * 3
    assert {Cell(path).result["parent"]["rounds"] for path in Path("runs/sweep").glob("*-R3-*")} == {2}
    assert invoke("-m", "runs/sweep", "rounds=3", main=extend.main) == 0
    assert capsys.readouterr().out.count("done already") == 2
    assert len(trained) == 2 * 3
