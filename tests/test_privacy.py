"""What leaves a client: the declared slices, the image count and the loss, nothing else."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import SLICE_PREFIXES, Cell
from safetensors import safe_open
from safetensors.torch import load_file

from fedlight.federation.store import Store

MakeCell = Callable[..., Cell]


def slice_of(name: str) -> str:
    (owner,) = (s for s, prefixes in SLICE_PREFIXES.items() if name.split(".")[1] in prefixes)
    return owner


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Records, as bytes on disk, every report that reaches the federator."""
    recorded = []
    take = Store.reports

    def record(store: Store):
        for _, path in sorted(store._reports.items()):
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            recorded.append({"file": path.name, "metadata": metadata, "tensors": load_file(path)})
        yield from take(store)

    monkeypatch.setattr(Store, "reports", record)
    return recorded


@pytest.mark.parametrize(
    ("method", "declared"),
    [
        ("FULL", {"encoder", "bottleneck", "decoder"}),
        ("UDEC", {"decoder"}),
        ("ULATDEC", {"bottleneck", "decoder"}),
        ("LOCAL", set()),
    ],
)
def test_nothing_but_the_declared_slices_count_and_loss_reaches_the_federator(
    cell: MakeCell, wire: list[dict], method: str, declared: set[str]
) -> None:
    made = cell(f"method={method}", "clients=3", "rounds=2", "model.ema_decay=0.9")
    assert len(wire) == 6
    for report in wire:
        assert {slice_of(name) for name in report["tensors"]} == declared
        assert all(name.startswith("unet.") for name in report["tensors"])
        assert set(report["metadata"]) == {"images", "loss", "cell"}
        client = int(report["file"].split("-")[0])
        assert int(report["metadata"]["images"]) == made.sizes[client]
        assert 0 < float(report["metadata"]["loss"]) < 10
    booked = sum(int(row["params"]) for row in made.rows("ledger.csv") if row["direction"] == "up")
    assert booked == sum(tensor.numel() for report in wire for tensor in report["tensors"].values())


def test_usplit_clients_send_what_they_were_dealt(cell: MakeCell, wire: list[dict]) -> None:
    made = cell("method=USPLIT", "clients=5", "rounds=1")
    dealt: dict[int, set[str]] = {}
    for row in made.rows("ledger.csv"):
        if row["direction"] == "up":
            dealt.setdefault(int(row["client"]), set()).add(row["slice"])
    sent = [{slice_of(name) for name in report["tensors"]} for report in wire]
    assert sent == [dealt[client] for client in range(5)]
    assert len({frozenset(slices) for slices in sent}) > 1


@pytest.mark.parametrize(
    ("method", "private"), [("UDEC", {"encoder", "bottleneck"}), ("ULATDEC", {"encoder"})]
)
def test_private_slices_of_two_clients_differ_and_never_meet(
    cell: MakeCell, wire: list[dict], method: str, private: set[str]
) -> None:
    untrained = cell("rounds=0").model
    made = cell(f"method={method}", "clients=2", "rounds=1")
    first, second = map(load_file, sorted(made.folder.glob("checkpoint/clients/*-r0001-*")))
    assert {slice_of(name) for name in first} == private
    weights = [name for name in first if name.endswith("weight") and "depthwise" in name]
    assert weights
    assert all(not torch.equal(first[name], second[name]) for name in weights)

    federated = made.model
    for name, tensor in untrained.items():
        unchanged = torch.equal(tensor, federated[name])
        assert unchanged == (slice_of("unet." + name) in private) or name.endswith("bias")
    reported = {name for report in wire for name in report["tensors"]}
    assert not reported & set(first)


def test_the_global_model_is_the_weighted_mean_of_the_reports(cell: MakeCell, wire: list[dict]) -> None:
    made = cell("method=FULL", "clients=3", "rounds=1", "partition=quantity_skew")
    counts = np.array([int(report["metadata"]["images"]) for report in wire])
    assert len(set(counts)) > 1
    for name, tensor in made.model.items():
        stacked = np.stack([report["tensors"]["unet." + name].double().numpy() for report in wire])
        mean = np.tensordot(counts / counts.sum(), stacked, axes=1)
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-6, atol=1e-8)


def test_the_reported_loss_is_weighted_by_data_size(cell: MakeCell, wire: list[dict]) -> None:
    made = cell("method=FULL", "clients=3", "rounds=1", "partition=quantity_skew")
    counts = np.array([int(report["metadata"]["images"]) for report in wire])
    losses = np.array([float(report["metadata"]["loss"]) for report in wire])
    assert made.result["train_loss"] == pytest.approx((counts * losses).sum() / counts.sum(), rel=1e-12)
