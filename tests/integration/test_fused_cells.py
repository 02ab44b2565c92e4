"""Fused clients of whole cells: each has the update that it has alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import config

from fedlight.config import CellConfig
from fedlight.data.client_data import ClientData
from fedlight.experiment.clients import make_site
from fedlight.experiment.setup import make_cell_server, set_up
from fedlight.federation.messages import State
from fedlight.federation.transport.inline import Inline
from fedlight.federation.transport.transport import TransportContext

SMALL = ("data.limit=75", "evaluation.grid=0", "logger=none", "epochs=2")


class DoubleData(ClientData):
    """The batches of a client in float64, so that rounding errors of an optimizer do not hide others."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        scaled = super().on_after_batch_transfer(batch, dataloader_idx)
        return scaled.double() if isinstance(scaled, torch.Tensor) else (scaled[0].double(), scaled[1])


def updates(
    cell: CellConfig, folder: Path, double: bool = True
) -> dict[tuple[int, int], tuple[State, float]]:
    """Two rounds of a cell, in float64 or float32: (round, client) -> tensors and loss of each update."""
    parts = set_up(cell)
    if double:
        parts.model.double()
    site = make_site(parts, folder)
    pixels, labels = parts.training_data()
    kind = DoubleData if double else ClientData
    site.setup = replace(
        site.setup,
        data=lambda client: kind(pixels, parts.training_indices[client], cell.data.batch_size, labels),
    )
    server = make_cell_server(folder.name, parts)
    transport = Inline(TransportContext(site, lambda: site, 1, server, None))  # type: ignore[arg-type]
    results = {}
    for _ in range(2):
        for update in transport.exchange(server.start_round()):
            tensors = {
                f"{slice_}/{name}": tensor
                for slice_, payload in update.payloads.items()
                for name, tensor in payload.tensors.items()
            }
            assert update.loss is not None
            results[update.round, update.client] = tensors, update.loss
            server.receive(update)
        server.finish_round()
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("partition=quantity_skew", "partition.beta=0.5", "federation.dropout=0.2"),
        (
            *("method=UDEC", "model.conditional=true", "model.ema_decay=0.9", "algorithm=localadam"),
            "partition=label_skew",
        ),
        (
            *("model=unet2d", "model.conditional=true", "algorithm=scaffold", "model.snr_gamma=5"),
            "partition=shards",
        ),
        ("model.loss=mse", "algorithm=fednova", "model.snr_gamma=5", "partition=label_skew"),
        ("method=USPLIT", "model=unet2d", "trainer.gradient_clip_val=0.1"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_each_update_is_that_of_the_client_alone(tmp_path: Path, overrides: Sequence[str]) -> None:
    """Three clients of about 25 images in batches of 5: 16 to 32 steps of each client in two rounds.

    The skewed ones have 4, 4 and 8 batches, or 4, 5 and 6, and are one group.
    """
    alone, fused = (
        updates(config(*SMALL, "clients=3", "data.batch_size=5", *overrides, *more), tmp_path / folder)
        for folder, more in (("alone", ()), ("fused", ("trainer.fuse=4",)))
    )
    assert alone.keys() == fused.keys()
    for key, (tensors, loss) in alone.items():
        assert fused[key][1] == pytest.approx(loss, abs=1e-6)
        for name, tensor in tensors.items():
            torch.testing.assert_close(fused[key][0][name], tensor, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [
        (("optimizer._target_=torch.optim.SGD", "~optimizer.fused", "optimizer.lr=0.05"), 1e-6),
        (("+optimizer.eps=1e-4",), 1e-5),  # Adam, with a divisor far above the rounding of gradients
    ],
    ids=["SGD", "Adam"],
)
def test_in_float32_updates_differ_by_rounding(
    tmp_path: Path, optimizer: tuple[str, ...], tolerance: float
) -> None:
    """Adam's first steps are the signs of gradients: where these are all rounding, so is the step."""
    steps = ("data.batch_size=5", "epochs=4")  # 20 in a round
    alone, fused = (
        updates(config(*SMALL, "clients=3", *steps, *optimizer, *more), tmp_path / folder, double=False)
        for folder, more in (("alone", ()), ("fused", ("trainer.fuse=4",)))
    )
    for client in range(3):
        for name, tensor in alone[1, client][0].items():
            torch.testing.assert_close(fused[1, client][0][name], tensor, atol=tolerance, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "paper", "unet2d"])
def test_in_bf16_fused_clients_are_as_near_to_float32_as_one_alone(tmp_path: Path, model: str) -> None:
    few = ("data.limit=30", "clients=3", "data.batch_size=5", "epochs=1", f"model={model}")
    sgd = ("optimizer._target_=torch.optim.SGD", "~optimizer.fused", "optimizer.lr=0.05")
    exact, alone, fused = (
        updates(config(*SMALL, *few, *sgd, *more), tmp_path / "-".join(more), double=False)
        for more in (
            ("trainer.precision=32-true",),
            ("trainer.precision=bf16-mixed",),
            ("trainer.precision=bf16-mixed", "trainer.fuse=3"),
        )
    )
    for key, (tensors, _) in exact.items():
        by_one, by_several = (
            sum(float((result[key][0][name] - tensor).square().sum()) for name, tensor in tensors.items())
            for result in (alone, fused)
        )
        assert 0.5 < (by_several / by_one) ** 0.5 < 2
