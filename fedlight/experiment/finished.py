"""A finished cell, opened again: its models as they were at the end."""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fedlight.config import CellConfig, validate
from fedlight.diffusion.ddpm import DDPM
from fedlight.experiment.build import make_module
from fedlight.experiment.evaluate import draw
from fedlight.federation.federator import Federator
from fedlight.federation.store import State, Store
from fedlight.runs.identity import read_result
from fedlight.runtime.errors import BadInput

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class FinishedCell:
    """What a completed cell left: its settings, an empty model and the states to load into it."""

    folder: Path
    settings: CellConfig
    module: DDPM
    federator: Federator

    def state(self, client: int | None) -> State:
        """The state_dict of a client's own model, or of the federated one where `client` is None.

        Raises:
            BadInput: there is no such model.
        """
        per_client, clients = self.federator.method.evaluate == "clients", self.settings.clients
        if client is None and per_client:
            raise BadInput(
                f"{self.folder.name}: the trained models of {self.settings.method.name} are the clients' "
                f"own; choose one with --client 0 to {clients - 1}"
            )
        if client is None:
            return self.federator.global_state()
        if not per_client:
            raise BadInput(
                f"{self.folder.name}: the trained model of {self.settings.method.name} is the federated "
                "one; leave out --client"
            )
        if not 0 <= client < clients:
            raise BadInput(f"{self.folder.name}: clients are 0 to {clients - 1}, got {client}")
        return self.federator.client_state(client)

    def draw(self, client: int | None, images: int, seed: int) -> Tensor:
        """Images of a model, uint8, shape (images, channels, height, width), by the cell's own sampler."""
        return draw(self.module, DEVICE, self.state(client), self.settings, images, seed)


def open_cell(folder: Path) -> FinishedCell:
    """Opens the cell in a folder such as `runs/demo/<cell>`.

    Raises:
        BadInput: no cell is there, or it is not completed.
    """
    status = (read_result(folder) or {}).get("status")
    if status != "completed":
        raise BadInput(f"{folder} holds no completed cell" + (f": it is {status}" if status else ""))
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    settings = validate(config)
    module, slices = make_module(config, settings)
    store = Store(folder / "checkpoint", folder.name)
    federator = Federator(settings.method.resolve(slices.names), slices, module, store)
    saved = store.resume(federator.keeping)
    if (saved.round if saved else 0) != settings.rounds:
        raise BadInput(f"{folder}: the checkpoint is damaged; its models are lost but for {folder / 'model'}")
    federator.state = saved.state if saved else federator.state
    return FinishedCell(folder, settings, module, federator)
