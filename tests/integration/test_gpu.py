"""What must hold on a GPU, in `make gpu`; without one, `pytest -m gpu` tries the same on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Cell
from fused_step import WARM, FusedStep
from pretrained import save_pretrained

from fedlight.experiment.finished import open_cell
from fedlight.experiment.parts import CellParts
from fedlight.federation.federator import Federator
from fedlight.finetuning.frozen_bf16 import FrozenInBf16
from fedlight.runtime.signals import Interrupted

pytestmark = pytest.mark.gpu

BITS = ("state_sha256", "client_sha256", "train_loss")


def bits(cell: Cell) -> list[Any]:
    return [cell.result[key] for key in BITS]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_cell_trains_on_the_device_and_after_an_interruption_to_the_same_bits(
    command: Callable[..., int], cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    asked = ["method=UDEC", "clients=2", "epochs=5", "optimizer.lr=2e-3", f"trainer.precision={precision}"]
    whole = cell(*asked)
    losses = [float(row["train_loss"]) for row in whole.rows("rounds.csv")]
    assert losses[-1] < losses[0]
    assert whole.result["machine"]["precision"] == precision
    if torch.cuda.is_available():
        assert torch.cuda.max_memory_allocated() > 0

    begin = Federator.on_fit_start

    def interrupted(self: Federator, trainer: Any, module: Any) -> None:
        begin(self, trainer, module)
        if self._round == 2:
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(Federator, "on_fit_start", interrupted)
        assert command(*SMALL, "name=stopped", *asked) == 128 + 15
    assert command(*SMALL, "name=stopped", *asked) == 0
    assert bits(Cell(whole.folder.parents[1] / "stopped" / whole.folder.name)) == bits(whole)


def test_fused_clients_train_on_the_device_to_the_same_bits_and_near_those_of_one_after_another(
    cell: Callable[..., Cell],
) -> None:
    asked = ["clients=4", "method=UDEC", "algorithm=scaffold", "trainer.fuse=2", "optimizer.lr=2e-3"]
    one, two = (cell(*asked, f"trainer.workers={workers}") for workers in (1, 2))
    assert bits(one) == bits(two)
    alone = cell(*asked, "trainer.fuse=null")
    assert one.result["train_loss"] == pytest.approx(alone.result["train_loss"], rel=1e-3)


@pytest.mark.parametrize("clients", [1, 3])
def test_a_recorded_step_is_the_step(clients: int) -> None:
    """On a GPU a CUDA graph is replayed; on a CPU its computation is called."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recorded, plain = (
        FusedStep(clients, 3, device, ("data=digits", "model=tiny", "optimizer.lr=1e-4"), graph)
        for graph in (True, False)
    )
    for _ in range(WARM if device == "cuda" else 0):  # the steps before the recording
        plain._compute_once()
    for _ in range(3):
        losses = recorded()
        assert losses.shape == (clients,)
        torch.testing.assert_close(losses, plain(), rtol=1e-4, atol=1e-5)


def test_clients_trained_at_once_come_to_the_same_bits(cell: Callable[..., Cell]) -> None:
    alone, at_once = (cell("clients=2", f"trainer.workers={workers}") for workers in (1, 2))
    assert bits(alone) == bits(at_once)


def test_frozen_weights_in_bf16_change_no_bit(
    cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretrained = f"finetuning.pretrained={save_pretrained(tmp_path / 'pretrained', 'UNet2DModel')}"
    arguments = ["finetuning=lora", pretrained, "method=UDEC", "clients=2", "trainer.precision=bf16-mixed"]
    arguments += ["transport=inline", "evaluation.grid=4"]
    made = []
    for callbacks in ([], [FrozenInBf16()]):
        monkeypatch.setattr(CellParts, "frozen_bf16", callbacks)
        made.append(cell(*arguments))
    one, two = made
    assert bits(one) == bits(two)
    images = [opened.sample(0, images=4) for opened in (open_cell(one.folder), open_cell(two.folder))]
    assert torch.equal(*images)
