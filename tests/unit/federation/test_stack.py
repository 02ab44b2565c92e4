"""Clients that train in one computation have the updates and the memory that they have alone."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from toy import FULL, PARTIAL, Toy, ToyData, federate, inline, toy_server, toy_setup, toy_site

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.fednova import FedNova
from fedlight.federation.algorithms.fedprox import FedProx
from fedlight.federation.algorithms.localadam import LocalAdam
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.client import ClientSetup
from fedlight.federation.federation_config import TrainerConfig
from fedlight.federation.grouping import make_groups
from fedlight.federation.messages import Update, from_bytes, to_bytes
from fedlight.federation.method import Method
from fedlight.federation.site import Site
from fedlight.federation.stack import ELEMENTWISE, check_stackable
from fedlight.federation.store import Versions
from fedlight.federation.trainer import limit_batches
from fedlight.runtime.errors import BadInput, Diverged

ADAM = partial(torch.optim.Adam, lr=0.01, fused=True)
ROUNDS = 4
PRIVATE = Method(
    name="PRIVATE", downlink=("shared",), uplink=("shared",), evaluate="clients", keep_optimizer=True
)
WARM = Method(
    name="WARM", downlink=("shared",), uplink=("shared",), evaluate="clients", warm_start=2, freeze=("own",)
)


class NoisyToy(Toy):
    """The toy with a noise drawn for each row, so that a wrong stream of random numbers shows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_of(self.draw(batch))

    def draw(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        return {"x": x + 0.1 * torch.randn_like(x), "y": y}

    def loss_of(self, drawn: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        losses = (self.shared(self.own(drawn["x"])) - drawn["y"]).square().mean(dim=1)
        return losses.mean() if weights is None else (weights * losses).sum()


def setups(*arguments: Any, **options: Any) -> tuple[ClientSetup, ClientSetup]:
    """The same clients alone, and up to three of them in one computation."""
    optimizer = options.pop("optimizer", ADAM)
    alone = toy_setup(*arguments, module=NoisyToy(optimizer), **options)
    return alone, replace(toy_setup(*arguments, module=NoisyToy(optimizer), **options), fuse=3)


def train(setup: ClientSetup, folder: Path, dropout: float = 0.3) -> tuple[list[Update], dict[str, Any]]:
    """All updates of a federation of nine clients, and what its clients and its server hold at the end."""
    server, site = toy_server(setup, clients=9, fraction=0.8, dropout=dropout), toy_site(setup, folder)
    transport, updates = inline(site), []

    class Recorded:
        def exchange(self, broadcasts: Any) -> Any:
            for update in transport.exchange(broadcasts):
                updates.append(update)
                yield update

        evaluate = None

    losses = [outcome.train_loss for outcome in federate(server, Recorded(), ROUNDS)]  # type: ignore[arg-type]
    memory = {}
    for path in sorted((folder / "clients").rglob("*.safetensors")):
        version = path.relative_to(folder / "clients").with_name(path.stem.rpartition("-")[0])
        memory[str(version)] = Versions(path.parent, "toy").read(path)[1]
    updates.sort(key=lambda update: (update.round, update.client))
    return updates, {"server": server.theta, "loss": losses, "memory": memory, "ledger": server.ledger.bytes}


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Tensors and numbers in nested mappings and lists are equal to 1e-5; everything else is equal."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, Tensor):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, float | list):
        assert one == pytest.approx(other, abs=1e-5), where
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("method", "algorithm", "optimizer"),
    [
        (FULL, FedAvg(), ADAM),
        (FULL, FedProx(0.3), ADAM),
        (FULL, Scaffold(), partial(torch.optim.SGD, lr=1e-3, momentum=0.9)),
        (FULL, FedNova(), ADAM),
        (FULL, LocalAdam(), ADAM),
        (PARTIAL, FedProx(0.3), ADAM),
        (PARTIAL, Scaffold(), ADAM),
        (PRIVATE, FedAvg(), ADAM),
        (PRIVATE, LocalAdam(), ADAM),
        (WARM, Scaffold(), ADAM),
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_a_fused_client_trains_as_it_does_alone(
    tmp_path: Path, method: Method, algorithm: FedAvg, optimizer: Any
) -> None:
    """Nine clients of 2 to 10 rows in batches of 2, up to 10 steps a round, four rounds with drop-outs.

    Up to three clients with 3, 4 and 5 batches are a group, or clients with 1 and 2.
    """
    alone, fused = setups(method, algorithm, optimizer=optimizer)
    (updates, ends), (fused_updates, fused_ends) = (
        train(setup, tmp_path / str(setup.fuse)) for setup in (alone, fused)
    )
    assert len(updates) == len(fused_updates) > 15
    for update, other in zip(updates, fused_updates, strict=True):
        for field in ("round", "client", "num_examples", "loss"):
            assert_equal(getattr(update, field), getattr(other, field), field)
        tensors = ({name: p.tensors for name, p in u.payloads.items()} for u in (update, other))
        assert_equal(*tensors, where=f"client {update.client}")
    assert_equal(ends, fused_ends)


def trainer_with(**arguments: Any) -> Any:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def make_trainer(callbacks: list[Any]) -> Trainer:
        return Trainer(
            accelerator="cpu",
            max_epochs=2,
            enable_model_summary=False,
            callbacks=callbacks,
            **quiet,
            **arguments,
        )

    return make_trainer


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        {"max_steps": 6},
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.7},
    ],
    ids=str,
)
def test_the_arguments_of_the_trainer_apply_to_each_client(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Gradients are clipped for each client, batches are limited and accumulated as alone."""
    limit = TrainerConfig(accelerator="cpu", precision="32-true", threads=1, **arguments)
    results = []
    for setup in setups(FULL, FedNova(), optimizer=partial(torch.optim.SGD, lr=1e-3)):
        setup = replace(
            setup,
            data=lambda client: ToyData(client + 4),
            make_trainer=trainer_with(**arguments),
            epoch_batches=partial(limit_batches, limit),
            fuse_unequal="accumulate_grad_batches" not in arguments,
        )
        results.append(train(setup, tmp_path / str(setup.fuse))[1])
    assert_equal(*results)


@pytest.mark.parametrize("optimizer", sorted(ELEMENTWISE, key=lambda kind: kind.__name__))
def test_a_client_that_leaves_takes_its_own_state_of_any_optimizer(tmp_path: Path, optimizer: Any) -> None:
    """One round, so that the clients' kept step counts, which are scalars, differ at the end alone."""
    results = []
    for setup in setups(PRIVATE, LocalAdam(), optimizer=partial(optimizer, lr=0.01)):
        site = toy_site(setup, tmp_path / str(setup.fuse))
        server = toy_server(setup, clients=5)
        updates = sorted(inline(site).exchange(server.start_round()), key=lambda update: update.client)
        memories = [site.memory.read(client, 1) for client in range(5)]
        results.append(
            {
                "sent": {u.client: {name: p.tensors for name, p in u.payloads.items()} for u in updates},
                "kept": dict(enumerate(memories)),
            }
        )
    assert_equal(*results)


class CountingToy(NoisyToy):
    """The toy with a counter of steps that each client keeps."""

    counters = ("own.count",)

    def __init__(self, optimizer: Any = ADAM) -> None:
        super().__init__(optimizer)
        self.own.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def on_train_batch_end(self, outputs: object, batch: Any, batch_idx: int) -> None:
        count: Any = self.own.count
        count += 1


def test_clients_whose_counters_differ_are_one_group(tmp_path: Path) -> None:
    """Three clients of 3, 4 and 5 batches have taken different numbers of steps after the first round."""
    setup = replace(
        toy_setup(PARTIAL, module=CountingToy()), fuse=3, data=lambda client: ToyData(2 * client + 4)
    )
    fits = []

    def make_trainer(callbacks: list[Any]) -> Trainer:
        fits.append(1)
        return trainer_with()(callbacks)

    site = toy_site(replace(setup, make_trainer=make_trainer), tmp_path)
    server = toy_server(site.setup, clients=3)
    for _ in federate(server, inline(site), 2):
        pass
    assert len(fits) == 2
    assert [int(site.memory.read(client, 2)["model"]["own.count"]) for client in range(3)] == [12, 16, 20]


def test_groups_have_similarly_many_batches_and_leave_out_clients_that_drop_out(tmp_path: Path) -> None:
    """Clients of 1 to 5 batches, of which a group's largest has at most twice as many as the smallest."""
    _, fused = setups(FULL)
    for unequal in (True, False):
        setup = replace(fused, fuse_unequal=unequal)
        broadcasts = toy_server(setup, clients=9, dropout=0.3).start_round()
        groups = make_groups(broadcasts, setup)
        assert sorted(b.client for group in groups for b in group) == list(range(9))
        firsts = [min(b.client for b in group) for group in groups]
        assert firsts == sorted(firsts)
        assert max(len(group) for group in groups) == (3 if unequal else 2)
        for group in groups:
            batches = [len(ToyData(b.client).train_dataloader()) for b in group]
            assert batches == sorted(batches, reverse=True)
            assert batches[-1] >= (0.5 if unequal else 1) * batches[0]
            assert len(group) == 1 or not any(b.drops_out for b in group)
        assert make_groups(reversed(broadcasts), setup) == groups


@pytest.mark.parametrize(
    ("clients", "fuse", "sizes"),
    [(10, 4, [3, 3, 4]), (10, 5, [5, 5]), (5, 4, [2, 3]), (3, 4, [3]), (1, 4, [1])],
)
def test_groups_are_equally_large(clients: int, fuse: int, sizes: list[int]) -> None:
    setup = replace(toy_setup(FULL), fuse=fuse, data=lambda client: ToyData(3))
    groups = make_groups(toy_server(setup, clients=clients).start_round(), setup)
    assert [len(group) for group in groups] == sizes
    assert [b.client for group in groups for b in group] == list(range(clients))


def test_the_bits_of_a_fused_client_do_not_depend_on_what_was_done_before_a_kill(tmp_path: Path) -> None:
    """The journal and the memory hold one of a group of three before the group is done again."""
    _, fused = setups(PARTIAL)
    server = toy_server(fused, clients=9)
    (group,) = [group for group in make_groups(server.start_round(), fused) if group[-1].client == 0]
    assert [len(ToyData(b.client).train_dataloader()) for b in group] == [2, 2, 1]
    receipts = toy_site(fused, tmp_path / "site").update(group)
    expected = [receipt.read() for receipt in receipts if receipt]
    assert len(expected) == 3
    for place in range(3):
        folder = tmp_path / f"half{place}"
        site = toy_site(fused, folder)
        site.journal.open_round(1)
        (update, hash_) = site.train(group)[place]
        assert update
        site.journal.add(update.client, to_bytes(update), hash_)
        again = toy_site(fused, folder).update(group)
        assert [receipt.read() for receipt in again if receipt] == expected
    assert Site("toy", replace(fused, make_trainer=None), tmp_path / "site").update(group) == receipts  # type: ignore[arg-type]


def test_a_client_that_diverges_in_a_group_is_named(tmp_path: Path) -> None:
    class Exploding(ToyData):
        def __init__(self, client: int) -> None:
            super().__init__(client)
            if client == 2:
                self.rows = [(x * float("inf"), y) for x, y in self.rows]

    _, fused = setups(FULL)
    setup = replace(fused, data=Exploding)
    with pytest.raises(Diverged, match="client 2 became nan in round 1"):
        list(inline(toy_site(setup, tmp_path)).exchange(toy_server(setup, clients=9).start_round()))


def test_what_cannot_be_stacked_is_named() -> None:
    batch = (torch.zeros(1, 3), torch.zeros(1, 1))

    def check(module: LightningModule, optimizer: Any = ADAM) -> None:
        check_stackable(module, batch, optimizer(module.parameters()))

    check(NoisyToy())
    with pytest.raises(BadInput, match="LBFGS is not one of ASGD,"):
        check(NoisyToy(), torch.optim.LBFGS)
    buffered = NoisyToy()
    buffered.register_buffer("running_mean", torch.zeros(2))
    with pytest.raises(BadInput, match="running_mean is a buffer"):
        check(buffered)

    tied = NoisyToy()
    tied.other = tied.own
    with pytest.raises(BadInput, match=r"other\.weight is the parameter of two layers"):
        check(tied)

    class Branching(NoisyToy):
        def loss_of(self, drawn: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
            loss = super().loss_of(drawn, weights)
            return loss if loss > 0 else -loss

    with pytest.raises(BadInput, match="vmap cannot stack the model"):
        check(Branching())


def test_updates_of_fused_clients_can_be_sent(tmp_path: Path) -> None:
    """No tensor of an update is a view into the stack of all clients, which would be sent whole."""
    _, fused = setups(FULL)
    for update in inline(toy_site(fused, tmp_path)).exchange(toy_server(fused, clients=9).start_round()):
        assert to_bytes(from_bytes(to_bytes(update))) == to_bytes(update)
