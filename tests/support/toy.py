"""A small federation that knows no image: a linear model in two slices, on data of a few numbers."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.client import ClientSetup
from fedlight.federation.codec import Codec
from fedlight.federation.cohort import Participation
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.method import Method
from fedlight.federation.open_round import Outcome
from fedlight.federation.server import Server
from fedlight.federation.site import Site
from fedlight.federation.slices import SliceMap
from fedlight.federation.transport.inline import Inline
from fedlight.federation.transport.transport import Transport, TransportContext

FULL = Method(name="FULL", downlink="all", uplink="all", evaluate="global")
PARTIAL = Method(name="PARTIAL", downlink=("shared",), uplink=("shared",), evaluate="clients")


SGD = partial(torch.optim.SGD, lr=0.05)


class Toy(LightningModule):
    """own: 3 -> 2, shared: 2 -> 1; least squares."""

    def __init__(self, optimizer: Any = SGD) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.own, self.shared = nn.Linear(3, 2), nn.Linear(2, 1)
        self.optimizer = optimizer
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.shared(self.own(x)) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class ToyData(LightningDataModule):
    """Client k holds k + 2 rows, drawn from k."""

    def __init__(self, client: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(client)
        self.num_examples = client + 2
        x = torch.randn(self.num_examples, 3, generator=generator)
        self.rows = list(zip(x, x.sum(1, keepdim=True) * (client + 1), strict=True))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=2, shuffle=True)


def toy_setup(
    method: Method = FULL,
    algorithm: FedAvg | None = None,
    codec: Codec | None = None,
    epochs: int = 2,
    privacy: GaussianMechanism | None = None,
    module: LightningModule | None = None,
    **toy: Any,
) -> ClientSetup:
    module = module or Toy(**toy)
    slices = SliceMap.build({"own": ["own"], "shared": ["shared"]}, module.state_dict())

    def make_trainer(callbacks: list[Any]) -> Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Trainer(
            accelerator="cpu", max_epochs=epochs, enable_model_summary=False, callbacks=callbacks, **quiet
        )

    return ClientSetup(
        seed=5,
        module=module,
        slices=slices,
        method=method.resolve(slices.names),
        algorithm=algorithm or FedAvg(),
        codec=codec or Codec(),
        data=ToyData,
        make_trainer=make_trainer,
        evaluate=lambda states, round_, clients: [
            ({"norm": float(state["own.weight"].norm())}, {"grid": {"pixels": state["own.weight"]}})
            for state in states
        ],
        privacy=privacy,
    )


def toy_server(setup: ClientSetup, clients: int = 2, fraction: float = 1.0, dropout: float = 0.0) -> Server:
    first = setup.first
    privacy = setup.privacy
    participation = Participation(clients, fraction, dropout, setup.seed, poisson=privacy is not None)
    return Server(
        "toy",
        setup.method,
        setup.slices,
        first,
        participation,
        setup.algorithm,
        setup.codec,
        privacy=privacy,
    )


def federate(server: Server, transport: Transport, rounds: int) -> Iterator[Outcome]:
    """Runs the rounds that are left, one at each step of the loop."""
    while server.round < rounds:
        for update in transport.exchange(server.start_round()):
            server.receive(update)
        yield server.finish_round()


class Quiet:
    """A monitor that shows nothing and ends nothing."""

    def end_update(self) -> None:
        pass

    def check(self) -> None:
        pass


def toy_context(site: Site, clients: int = 2, **parts: Any) -> TransportContext:
    """What a transport gets in a federation of so many clients, on a machine with room for two processes."""
    server = toy_server(site.setup, clients)
    return TransportContext(
        site, **{"make_site": lambda: site, "max_workers": 2, "server": server, "monitor": Quiet(), **parts}
    )


def inline(site: Site) -> Inline:
    return Inline(toy_context(site))


def toy_site(setup: ClientSetup, folder: Path) -> Site:
    return Site("toy", setup, folder)
