"""Precision and compilation: what they may change, and what not."""

from collections.abc import Callable
from functools import partialmethod

import pytest
import torch
from conftest import Cell

from fedlight.runtime import machine
from fedlight.runtime.machine import best_precision

MakeCell = Callable[..., Cell]


@pytest.mark.parametrize(
    ("capabilities", "best"),
    [
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"avx512_f": True, "avx512_bf16": False}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_auto_is_bf16_only_where_the_processor_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], best: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert best_precision("cpu") == best


def test_auto_is_bf16_only_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, best in ((True, machine.HALF), (False, machine.FULL)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        assert best_precision("auto") == best_precision("gpu") == best


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_result_says_in_which_precision_the_clients_trained(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, fast: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    few = ["clients=1", "rounds=1", "data.limit=32", "trainer.accelerator=cpu"]
    made, asked = (cell(*few, f"trainer.precision={name}") for name in ("auto", precision))
    assert made.result["machine"]["precision"] == precision
    assert made.result["state_sha256"] == asked.result["state_sha256"]


@pytest.mark.filterwarnings("ignore:You passed")  # Lightning's own, of the same
def test_the_result_says_that_a_cpu_trains_in_bf16_where_fp16_is_configured(cell: MakeCell) -> None:
    few = ["clients=1", "rounds=1", "data.limit=32", "trainer.accelerator=cpu"]
    made, bf16 = (cell(*few, f"trainer.precision={name}") for name in ("16-mixed", "bf16-mixed"))
    assert made.result["machine"]["precision"] == "bf16-mixed"
    assert made.result["state_sha256"] == bf16.result["state_sha256"]


@pytest.mark.slow
def test_bf16_moves_every_weight_as_fp32_does_and_leaves_fp32_weights(cell: MakeCell) -> None:
    """By plain gradient descent, whose steps are as long as the gradients; Adam's are not."""
    descent = ["optimizer._target_=torch.optim.SGD", "~optimizer.fused", "optimizer.lr=0.05"]
    asked = ["clients=2", "data.batch_size=60", *descent]  # batches of 2^15 elements and more
    full, half = (cell(*asked, f"trainer.precision={name}") for name in ("32-true", "bf16-mixed"))
    untrained = cell("clients=2", "rounds=0").model
    assert half.result["train_loss"] == pytest.approx(full.result["train_loss"], rel=0.01)
    for name, tensor in half.model.items():
        assert tensor.dtype == torch.float32
        apart = (tensor - full.model[name]).norm() / (full.model[name] - untrained[name]).norm()
        assert 0 < apart < 0.1, name


@pytest.mark.slow
def test_a_compiled_unet_trains_to_the_same_weights(cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # without C++, which takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    small = ["clients=2", "rounds=1", "data.limit=32", "model.unet.dim=4", "model.unet.dim_mults=[1]"]
    eager, compiled = (cell(*small, f"trainer.compile={flag}") for flag in ("false", "true"))
    assert compiled.result["train_loss"] == pytest.approx(eager.result["train_loss"], rel=1e-5)
    for name, tensor in eager.model.items():
        torch.testing.assert_close(compiled.model[name], tensor, rtol=1e-4, atol=1e-5)
