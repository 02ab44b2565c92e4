"""The Python API: a cell runs as by the command, a sweep is a table, a finished cell is opened."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import SMALL, Cell
from torch import Tensor

import fedlight
from fedlight.federation.server import Outcome, Server

CELL = [*SMALL, "clients=2", "partition=label_skew"]
HEAVY = ("torch", "lightning", "hydra", "pandas", "omegaconf", "pydantic")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two cells, FULL and UDEC, of which UDEC has scores and a grid of images."""
    output = tmp_path_factory.mktemp("sweep")
    quality = ["evaluation.samples=70", "evaluation.grid=8"]
    for method in ("FULL", "UDEC"):
        fedlight.run([*CELL, *(quality if method == "UDEC" else ()), f"method={method}", f"output={output}"])
    return output / "default"


def folder_of(sweep: Path, method: str) -> Path:
    (folder,) = sweep.glob(f"{method}-*")
    return folder


def test_import_loads_no_library() -> None:
    program = (
        f"import sys, fedlight; print(sorted({set(HEAVY)} & sys.modules.keys()), 'load' in dir(fedlight))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout == "[] True\n"


def test_a_cell_is_the_one_of_the_command(cell: Callable[..., Cell], tmp_path: Path) -> None:
    typed = ["method=UDEC", "clients=2", "partition=label_skew"]
    by_command = cell(*typed)
    torch.set_num_threads(2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    result = fedlight.run([*SMALL, *typed, "name=api"])
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(1)

    assert result.folder == Path("runs/api", by_command.folder.name)
    stored = json.loads((result.folder / "result.json").read_text())
    assert stored["client_sha256"] == by_command.result["client_sha256"]
    assert len(set(stored["client_sha256"])) == 2


def test_a_result_has_the_numbers_of_its_files(sweep: Path) -> None:
    folder = folder_of(sweep, "UDEC")
    result, stored = fedlight.CellResult(folder), Cell(folder)
    assert (result.cell, result.method, result.config["rounds"]) == (folder.name, "UDEC", 2)
    assert result.scores["fid"] == stored.result["fid"]["value"]
    assert result.scores["coverage"] == stored.result["fid"]["coverage"]["share"]
    for name, value in result.exchange.items():
        assert value == stored.result["exchange"][name]
    assert result.seconds["total"] == stored.result["seconds"]["total"]
    assert list(result.rounds["params_up"]) == [int(row["params_up"]) for row in stored.rows("rounds.csv")]
    assert result.images == folder / "samples" / "round_002.png"
    assert re.fullmatch(r"<CellResult .*UDEC-K2-.*method UDEC, .* clients 2, .*FID .*>", repr(result))
    html = result._repr_html_()
    assert "<td" in html
    assert "data:image/png;base64," in html

    unscored = fedlight.CellResult(folder_of(sweep, "FULL"))
    assert (unscored.scores, unscored.images) == ({}, None)
    assert "<img" not in unscored._repr_html_()


def test_a_cell_that_is_done_is_returned_as_it_is(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(sweep, "FULL")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert fedlight.run([*CELL, "method=FULL", f"output={sweep.parent}"]).folder == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "done already" in capsys.readouterr().out


BAD = {
    "unknown method": (["method=FULLL"], "'method/FULLL'.*CENTRAL FULL LOCAL"),
    "misspelled key": (["clints=2"], "clints is not a key .* did you mean clients"),
    "value out of range": (["clients=0"], "clients: .* greater than or equal to 1, got 0"),
    "several cells": (["method=FULL,UDEC"], "method=FULL,UDEC stands for several cells: .* in a loop"),
    "several cells by choice": (["seed=range(1,3)"], "several cells"),
    "grid": (["sweeps=smoke"], "sweeps=smoke is a grid of several cells: .* choose one by method="),
    "option": (["--dry"], "--dry is an option of the command; overrides are KEY=VALUE"),
    "no key": (["clients"], "Error parsing override 'clients'"),
    "text": ("method=FULL", r"overrides must be a list, such as \[.method=UDEC.\], got 'method=FULL'"),
    "two sections that do not fit": ([*CELL, "evaluation.guidance=3"], "needs model.conditional=true"),
    "secret": (["+logger.api_key=abcdefgh", "clients=0"], "clients: .* got 0"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_exception_of_one_line(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDLIGHT_SECRET_LOGGER_API_KEY", raising=False)
    with pytest.raises(fedlight.FedlightError, match=message) as raised:
        fedlight.run(overrides)
    text = str(raised.value)
    assert "\n" not in text
    assert "abcdefgh" not in text
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_folder_of_one_s_own_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my configs/method").mkdir(parents=True)
    Path("my configs/method/UENC.yaml").write_text(
        "name: UENC\ndownlink: [encoder]\nuplink: [encoder]\nsplit: null\nevaluate: clients\n"
    )
    typed = [*CELL, "rounds=1", "method=UENC", "sweeps=skew", "partition=iid"]
    result = fedlight.run(typed, config_dir="my configs")
    assert {row["slice"] for row in Cell(result.folder).rows("ledger.csv") if row["direction"] == "up"} == {
        "encoder"
    }
    with pytest.raises(fedlight.FedlightError, match="config_dir: no folder nowhere"):
        fedlight.run(typed, config_dir="nowhere")


def test_an_interrupted_cell_continues_by_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    finish_round = Server.finish_round
    typed = [*CELL, "method=FULL"]

    def interrupt(server: Server) -> Outcome:
        os.kill(os.getpid(), signal.SIGINT)  # as a notebook's "interrupt the kernel"
        return finish_round(server)

    with monkeypatch.context() as patch:
        patch.setattr(Server, "finish_round", interrupt)
        with pytest.raises(KeyboardInterrupt, match="the same call continues it"):
            fedlight.run(typed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(fedlight.run(typed).rounds) == 2
    assert "goes on after round 1" in capsys.readouterr().err


def test_a_sweep_is_a_table(sweep: Path, tmp_path: Path) -> None:
    table = fedlight.load(sweep).set_index("method")
    assert list(table.index) == ["FULL", "UDEC"]
    assert set(table["status"]) == {"done"}
    for method, row in table.iterrows():
        stored = Cell(Path(row["folder"])).result
        assert (stored["method"], stored["clients"], stored["seed"]) == (method, row["clients"], row["seed"])
        assert row["params"] == stored["exchange"]["params_total"]
        assert row["bytes"] == stored["exchange"]["bytes_total"]
        assert row["partition"] == "label_skew"
    assert pd.isna(table.loc["FULL", "fid"])
    assert table.loc["UDEC", "fid"] == fedlight.CellResult(folder_of(sweep, "UDEC")).scores["fid"]
    assert dict(table["evaluation.grid"]) == {"FULL": 0, "UDEC": 8}, "a key in which the cells differ"

    rounds = fedlight.load(sweep, rounds=True)
    assert list(rounds["round"]) == [1, 2, 1, 2]
    assert list(rounds["method"]) == ["FULL", "FULL", "UDEC", "UDEC"]
    assert [pd.isna(fid) for fid in rounds["fid"]] == [True, True, True, False]
    last = rounds.groupby("method")["bytes_cumulative"].last()
    assert dict(last) == dict(table["bytes"])

    assert len(fedlight.load(sweep.parent)) == 2
    assert list(fedlight.load(folder_of(sweep, "FULL"))["method"]) == ["FULL"]
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(fedlight.FedlightError, match="no cell here"):
            fedlight.load(nothing)


def test_a_damaged_cell_is_a_row_that_says_so(sweep: Path, tmp_path: Path) -> None:
    for method in ("FULL", "UDEC"):
        shutil.copytree(folder_of(sweep, method), tmp_path / "runs" / method)
    (tmp_path / "runs" / "FULL" / "result.json").write_text("{")
    table = fedlight.load(tmp_path / "runs").set_index("method")
    assert dict(table["status"]) == {"FULL": "corrupt", "UDEC": "done"}
    assert "result.json cannot be read" in table.loc["FULL", "note"]
    assert pd.isna(table.loc["FULL", "params"])


def test_a_client_s_model_is_a_pipeline_of_its_own(sweep: Path) -> None:
    opened = fedlight.open_cell(str(folder_of(sweep, "UDEC")))
    first, second = opened.model(0), opened.model(1)
    for client, pipeline in enumerate((first, second)):
        state = {f"unet.{name}": tensor for name, tensor in pipeline.unet.state_dict().items()}
        expected = opened.state(client)
        assert all(torch.equal(expected[name], tensor) for name, tensor in state.items())
    assert len(differing(first, second)) > 10
    images: Tensor = opened.sample(client=0, images=3)
    assert (images.shape, images.dtype) == ((3, 1, 8, 8), torch.uint8)
    assert torch.equal(opened.sample(client=0, images=3), images)
    drawn = first(batch_size=2, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (2, 8, 8, 1)
    with pytest.raises(fedlight.FedlightError, match="images must be 1 or more, got 0"):
        opened.sample(client=0, images=0)
    with pytest.raises(fedlight.FedlightError, match="trains a model for each client: choose one"):
        opened.model()


def differing(first: object, second: object) -> list[str]:
    states = [pipeline.unet.state_dict() for pipeline in (first, second)]  # type: ignore[attr-defined]
    return [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
