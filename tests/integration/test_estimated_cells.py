"""The bytes and steps of an estimate against those of cells that were run."""

from collections.abc import Callable

import pytest
from conftest import Cell
from omegaconf import OmegaConf

from fedlight.config import validate
from fedlight.deployment.disclosure import describe_disclosure
from fedlight.experiment.estimate import estimate
from fedlight.experiment.parts import CellParts
from fedlight.experiment.trial import check
from fedlight.federation import client
from fedlight.runs.identity import read_config

MakeCell = Callable[..., Cell]
SMALL = ("clients=3", "partition=quantity_skew", "data.limit=90", "data.batch_size=4", "rounds=3", "epochs=2")


def parts_of(made: Cell) -> CellParts:
    parts = check(validate(OmegaConf.create(read_config(made.folder / "config.yaml"))), elsewhere=False)
    assert parts is not None
    return parts


@pytest.mark.parametrize(
    "options",
    [
        ["method=FULL", "algorithm=localadam"],
        ["method=UDEC", "algorithm=localadam", "fraction=0.67"],
        ["method=UDEC_WARM", "++method.warm_start=1", "algorithm=localadam"],
        ["method=USPLIT", "algorithm=scaffold", "federation.dropout=0.2"],
        ["method=ULATDEC", "algorithm=fedadam", "transform=int8"],
        ["method=FULL", "+trainer.limit_train_batches=0.5"],
        ["method=FULL", "+trainer.max_steps=3"],
        ["method=FULL", "+trainer.accumulate_grad_batches=3"],
        ["method=FULL", "+trainer.accumulate_grad_batches=2", "+trainer.max_steps=5"],
        ["method=CENTRAL", "+trainer.limit_train_batches=5"],
    ],
    ids=" ".join,
)
def test_a_cell_costs_what_was_estimated(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    steps: list[int] = []
    finish = client._finish

    def noted(start: client.Start, end: client.End | None, setup: client.ClientSetup) -> object:
        steps.append(end.steps if end else 0)
        return finish(start, end, setup)

    monkeypatch.setattr(client, "_finish", noted)
    made = cell(*SMALL, "trainer.accelerator=cpu", *options)
    cost = estimate(parts_of(made))
    assert cost.bytes == made.result["exchange"]["bytes_total"]
    assert cost.steps == sum(steps) > 0


@pytest.mark.parametrize("transform", ["none", "int8"])
def test_the_bytes_that_leave_an_institution_are_stated(cell: MakeCell, transform: str) -> None:
    made = cell(*SMALL, "method=ULATDEC", f"transform={transform}")
    sent = [row for row in made.rows("ledger.csv") if (row["client"], row["direction"]) == ("1", "up")]
    lines = "\n".join(describe_disclosure(parts_of(made).config, parts_of(made), 1))
    assert {row["slice"] for row in sent} == {"bottleneck", "decoder"}
    for row in sent:
        size = f"{int(row['bytes']):,} bytes"
        stated = size if transform == "none" else f"about {size}, encoded"
        assert f"  {row['slice']:12} {int(row['params']):,} trained parameters, {stated}\n" in lines
