"""What leaves a client: the declared slices, the number of images and the loss, nothing else."""

from collections.abc import Callable
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch
from conftest import SLICE_PREFIXES, Cell, Wire

from fedlight.diffusion.ddpm import DDPM
from fedlight.federation.messages import Broadcast, Update

MakeCell = Callable[..., Cell]


def slice_of(name: str) -> str:
    (owner,) = (s for s, prefixes in SLICE_PREFIXES.items() if name.split(".")[1] in prefixes)
    return owner


@pytest.mark.parametrize(
    ("method", "declared"),
    [
        ("FULL", {"encoder", "bottleneck", "decoder"}),
        ("UDEC", {"decoder"}),
        ("ULATDEC", {"bottleneck", "decoder"}),
        ("LOCAL", set()),
    ],
)
def test_an_update_has_only_the_declared_slices_the_number_of_images_and_the_loss(
    cell: MakeCell, wire: Wire, method: str, declared: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[int, float]] = []  # images and loss of each, in order
    step = DDPM.training_step

    def noted(model: DDPM, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = step(model, batch, batch_idx)
        batches.append((len(batch), loss.item()))
        return loss

    monkeypatch.setattr(DDPM, "training_step", noted)
    made = cell(f"method={method}", "clients=3", "rounds=2", "epochs=2", "model.ema_decay=0.9")
    assert [(update.round, update.client) for update in wire.updates] == [
        (round_, client) for round_ in (1, 2) for client in range(3)
    ]
    assert {field.name for field in fields(Update)} == {
        *("cell", "round", "client", "num_examples", "loss", "payloads")
    }
    for update in wire.updates:
        assert set(update.payloads) == declared
        for slice_, payload in update.payloads.items():
            assert payload.tensors
            assert all(name.startswith("unet.") and slice_of(name) == slice_ for name in payload.tensors)
        assert update.num_examples == made.sizes[update.client]
        epochs: list[float] = []
        for _ in range(2):
            images, total = 0, 0.0
            while images < update.num_examples:
                count, loss = batches.pop(0)
                images, total = images + count, total + count * loss
            epochs.append(total / images)
        assert update.loss == pytest.approx(epochs[-1], rel=1e-5) != epochs[0]
    assert not batches


def test_usplit_clients_send_the_slices_that_were_assigned(cell: MakeCell, wire: Wire) -> None:
    made = cell("method=USPLIT", "clients=5", "rounds=1")
    dealt: dict[int, set[str]] = {}
    for row in made.rows("ledger.csv"):
        if row["direction"] == "up":
            dealt.setdefault(int(row["client"]), set()).add(row["slice"])
    sent = [set(update.payloads) for update in wire.updates]
    assert sent == [dealt[client] for client in range(5)]
    assert len({frozenset(slices) for slices in sent}) > 1


@pytest.mark.parametrize(
    ("method", "private"), [("UDEC", {"encoder", "bottleneck"}), ("ULATDEC", {"encoder"})]
)
def test_private_slices_are_never_sent_after_first_contact(
    cell: MakeCell, wire: Wire, method: str, private: set[str]
) -> None:
    untrained = cell("rounds=0").model
    made = cell(f"method={method}", "clients=2", "rounds=3")
    for message in (*wire.broadcasts, *wire.updates):
        first = isinstance(message, Broadcast) and message.round == 1
        assert set(message.payloads) == set(SLICE_PREFIXES) - (set() if first else private)
    assert len(set(made.result["client_sha256"])) == 2

    final = made.model
    moved = dict.fromkeys(SLICE_PREFIXES, False)
    for name, tensor in untrained.items():
        moved[slice_of("unet." + name)] |= not torch.equal(tensor, final[name])
    assert moved == {slice_: slice_ not in private for slice_ in SLICE_PREFIXES}


def test_the_global_model_is_the_weighted_mean_of_the_updates(cell: MakeCell, wire: Wire) -> None:
    made = cell("method=FULL", "clients=3", "rounds=1", "partition=quantity_skew")
    counts = np.array([update.num_examples for update in wire.updates])
    assert len(set(counts)) > 1
    sent = [{n: t for p in update.payloads.values() for n, t in p.tensors.items()} for update in wire.updates]
    for name, tensor in made.model.items():
        stacked = np.stack([tensors["unet." + name].double().numpy() for tensors in sent])
        mean = np.tensordot(counts / counts.sum(), stacked, axes=1)
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-6, atol=1e-8)


def test_the_loss_of_a_round_is_weighted_by_data_size(cell: MakeCell, wire: Wire) -> None:
    made = cell("method=FULL", "clients=3", "rounds=1", "partition=quantity_skew")
    counts = np.array([update.num_examples for update in wire.updates])
    losses = np.array([update.loss for update in wire.updates])
    assert made.result["train_loss"] == pytest.approx((counts * losses).sum() / counts.sum(), rel=1e-12)


WIRES = [("UDEC", "none"), ("UDEC", "topk")]
SLOW_WIRES = [("UDEC", "int4"), *product(("FULL", "USPLIT", "ULATDEC", "LOCAL", "CENTRAL"), ["none"])]
SLOW_WIRES += [("FULL", "best"), ("USPLIT", "lowrank"), ("ULATDEC", "int4"), ("LOCAL", "best")]
SLOW_WIRES += [("CENTRAL", "topk")]
"""Each method uncompressed and compressed, and each transform."""


@pytest.mark.parametrize(
    ("method", "transform"), [*WIRES, *(pytest.param(*wire, marks=pytest.mark.slow) for wire in SLOW_WIRES)]
)
def test_the_ledger_counts_exactly_the_messages(
    cell: MakeCell, wire: Wire, method: str, transform: str
) -> None:
    """Every payload is weighed as the bytes of its tensors, at the moment at which its message crosses."""
    dropout = ("federation.dropout=0.3", "fraction=0.7", "clients=4")
    made = cell(f"method={method}", "rounds=3", *dropout, f"transform={transform}")
    exchange = made.result["exchange"]
    crossed: list[tuple[str, str, str, str, str, str]] = []
    for direction, messages in (("down", wire.broadcasts), ("up", wire.updates)):
        for message in messages:
            for slice_, payload in message.payloads.items():
                weight = sum(len(tensor.numpy().tobytes()) for tensor in payload.tensors.values())
                row = (message.round, message.client, direction, slice_, payload.params, weight)
                crossed.append(tuple(map(str, row)))
    assert len(wire.broadcasts) == (3 if method == "CENTRAL" else 9)
    if method == "CENTRAL":  # its messages stay inside the server
        crossed = []
    booked = [tuple(row.values()) for row in made.rows("ledger.csv")]
    assert sorted(booked) == sorted(crossed)
    assert exchange["bytes_total"] == sum(int(row[5]) for row in crossed)
    assert exchange["params_total"] == sum(int(row[4]) for row in crossed)
    up = [row for row in crossed if row[2] == "up"]
    if transform != "none" and up:
        assert sum(int(row[5]) for row in up) < 0.3 * 4 * exchange["params_up"]
    elif method != "LOCAL" or transform == "none":
        assert exchange["bytes_total"] == 4 * exchange["params_total"]
