"""The estimate of a configuration against numbers computed by hand."""

import time
from typing import Any

import pytest
import torch
from composed import config

from fedlight.diffusion.ddpm import DDPM
from fedlight.experiment import estimate, step_time
from fedlight.experiment.trial import check
from fedlight.federation.stack import Stack


@pytest.mark.parametrize(("evaluated", "guided"), [("global", False), ("clients", False), ("global", True)])
def test_an_estimate_by_hand(evaluated: str, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 images of three clients in batches of 8: 3 batches each, 2 epochs, 4 rounds; a step takes 2 s."""
    method = {"global": "FULL", "clients": "UDEC"}[evaluated]
    arguments = ("clients=3", "data.limit=60", "data.batch_size=8", "epochs=2", "rounds=4", "partition=iid")
    scored = ("evaluation.samples=100", "evaluation.steps=10", "evaluation.every=2", "trainer.workers=2")
    cpu = ("trainer.accelerator=cpu", f"method={method}")
    labels = ("model.conditional=true", "evaluation.guidance=2") if guided else ()
    made = check(config(*arguments, *scored, *cpu, *labels), elsewhere=False)
    assert made is not None
    monkeypatch.setattr(step_time, "_step_seconds", lambda settings, parts, batch: 2.0 * batch / 8)
    cost = estimate.estimate(made)
    state, names = made.model.state_dict(), made.slices.names
    sizes = {slice_: sum(state[name].nbytes for name in names[slice_]) for slice_ in names}
    whole = sum(sizes.values())
    down = whole * 4 if evaluated == "global" else whole + 3 * sizes["decoder"]
    up = 4 * (whole if evaluated == "global" else sizes["decoder"])
    assert cost.steps == 3 * 3 * 2 * 4
    assert cost.bytes == 3 * (down + up)
    models = 3 if evaluated == "clients" else 2 if guided else 1  # a guided step calls the UNet twice
    image = 2.0 / 8
    assert cost.seconds == pytest.approx((72 * 8 * image + models * 2 * 100 * 10 * image / 3) / 2)


def test_fused_clients_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six clients of one batch in two groups of three: a step of a group takes 4 s, not 6."""
    arguments = ("clients=6", "data.limit=60", "data.batch_size=10", "epochs=1", "rounds=2", "trainer.fuse=3")
    cpu = ("partition=iid", "trainer.workers=2", "evaluation.grid=0")
    made = check(config(*arguments, *cpu), elsewhere=False)
    assert made is not None

    def seconds(settings: str, parts: object, batch: int, fuse: int = 1) -> float:
        return 2.0 if fuse == 1 else 4.0

    monkeypatch.setattr(step_time, "_step_seconds", seconds)
    assert estimate.estimate(made).seconds == pytest.approx(2 * 2 * 4.0 / 2)


def test_the_step_that_is_timed_has_a_batch_of_the_largest_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("clients=3", "data.limit=60", "data.batch_size=50", "partition=quantity_skew")
    made = check(config(*arguments, "trainer.accelerator=cpu"), elsewhere=False)
    assert made is not None
    timed: list[int] = []
    monkeypatch.setattr(step_time, "_step_seconds", lambda settings, parts, batch: timed.append(batch) or 1.0)
    estimate.estimate(made)
    sizes = sorted(map(len, made.client_indices))
    assert sizes[0] < sizes[-1] < 50
    assert timed == [sizes[-1]]


def test_a_step_is_timed_once_for_cells_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made = check(config("clients=2", "data.limit=40", "trainer.accelerator=cpu"), elsewhere=False)
    assert made is not None
    monkeypatch.setattr(step_time, "_step_seconds_cache", {})
    monkeypatch.setattr(step_time, "REPEATED_SECONDS", 0)
    sizes: list[int] = []
    step = DDPM.training_step

    def noted(module: DDPM, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        sizes.append(len(batch))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(DDPM, "training_step", noted)
    before = time.perf_counter()
    first = step_time._step_seconds("alike", made, 5)
    assert 0 < first < time.perf_counter() - before
    assert step_time._step_seconds("alike", made, 5) == first
    assert sizes == [5, 5], "the first step of two is not timed"
    step_time._step_seconds("another", made, 3)
    assert sizes == [5, 5, 3, 3]


@pytest.mark.parametrize("fuse", [1, 2])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_step_is_timed_in_the_precision_of_the_cell(
    monkeypatch: pytest.MonkeyPatch, precision: str, fuse: int
) -> None:
    cell = config("clients=2", "data.limit=40", "trainer.accelerator=cpu", f"trainer.precision={precision}")
    made = check(cell, elsewhere=False)
    assert made is not None
    monkeypatch.setattr(step_time, "_step_seconds_cache", {})
    taken: list[bool] = []
    for module in (DDPM, Stack):
        step = module.training_step

        def noted(*arguments: Any, step: Any = step) -> Any:
            taken.append(torch.is_autocast_enabled("cpu"))
            return step(*arguments)

        monkeypatch.setattr(module, "training_step", noted)
    seconds = step_time.alone_seconds(made) if fuse == 1 else step_time.fused_seconds(made, fuse)
    assert seconds > 0
    assert set(taken) == {precision == "bf16-mixed"}
