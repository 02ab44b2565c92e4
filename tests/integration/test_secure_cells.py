"""Whole cells under secure aggregation: the same bits in any process and after a kill; the audit."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Cell, invoke

from fedlight import audit
from fedlight.federation.server import Server

MakeCell = Callable[..., Cell]
SECURE = ["aggregation=secure", "clients=3", "data.limit=60", "rounds=2", "evaluation.grid=0"]


def same_bits(one: Cell, other: Cell) -> None:
    assert one.result["state_sha256"] == other.result["state_sha256"]
    assert one.result["train_loss"] == other.result["train_loss"]
    assert (one.folder / "ledger.csv").read_bytes() == (other.folder / "ledger.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["method=UDEC", "algorithm=scaffold"]])
def test_the_transport_changes_no_bit(cell: MakeCell, more: list[str]) -> None:
    """Starts worker processes, of loky and of Dask."""
    inline = cell(*SECURE, *more, "transport=inline")
    same_bits(inline, cell(*SECURE, *more, "transport=processes", "transport.workers=2"))
    if not more:
        same_bits(inline, cell(*SECURE, *more, "transport=dask", "transport.workers=2"))


@pytest.mark.slow
def test_a_killed_cell_goes_on_to_the_same_bits(cell: MakeCell, tmp_path: Path) -> None:
    """Starts two processes, of which one is killed in its second round."""
    whole = cell(*SECURE, "transport=inline")
    typed = [*SMALL, *SECURE, "transport=inline", "name=killed", f"output={tmp_path / 'out'}"]
    child = os.fork()
    if not child:
        receive = Server.receive

        def killed(server: Server, update: object) -> None:
            if server.round == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            receive(server, update)  # type: ignore[arg-type]

        Server.receive = killed  # type: ignore[method-assign,assignment]
        os._exit(invoke(*typed))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert invoke(*typed) == 0
    (path,) = (tmp_path / "out").glob("killed/*/result.json")
    same_bits(whole, Cell(path.parent))


@pytest.mark.slow
def test_the_audit_sees_nothing_in_a_masked_update(
    cell: MakeCell, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains a cell long enough to overfit, so that there is something to see."""
    overfitted = cell(*SECURE, "epochs=60", "optimizer.lr=0.003", "transport=inline", "evaluation.samples=0")
    assert invoke(str(overfitted.folder), "--images", "60", main=audit.main) == 0
    report = json.loads((overfitted.folder / "audit.json").read_text())
    auc = {attack["sees"]: attack["auc"] for attack in report["attacks"] if attack["attack"] == "loss drop"}
    prefix = "server, under secure aggregation: "
    assert set(auc) == {
        "update of client 0 before its mask",
        "update of client 1 before its mask",
        f"{prefix}masked update of client 0",
        f"{prefix}masked update of client 1",
        f"{prefix}sum of 3 clients",
    }
    for client in (0, 1):
        masked = auc[f"{prefix}masked update of client {client}"]
        plain = auc[f"update of client {client} before its mask"]
        assert masked[1] <= 0.5 <= masked[2], "chance lies within the interval"
        assert plain[0] > 0.6
    assert auc[f"{prefix}sum of 3 clients"][0] > 0.5
    assert f"{prefix}sum of 3 clients, loss drop: AUC" in capsys.readouterr().out
