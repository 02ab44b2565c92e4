"""A finished cell, opened again: its models as they were at the end. Nothing is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from fedlight.config import CellConfig, validate
from fedlight.diffusion.ddpm import DDPM
from fedlight.experiment.drawing import cycle_labels, draw_images
from fedlight.experiment.setup import CHECKPOINT, make_algorithm, make_module, make_server
from fedlight.experiment.targets import check_targets
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.codec import Codec
from fedlight.federation.messages import State
from fedlight.federation.server import Server
from fedlight.federation.site import client_memory
from fedlight.runs.identity import read_config, read_result
from fedlight.runs.reader import CellFiles
from fedlight.runtime.errors import BadInput, Damaged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class FinishedCell:
    """What a completed cell left: settings, an empty model, states to load into it, the number of classes."""

    folder: Path
    config: CellConfig
    module: DDPM
    server: Server
    classes: int

    def state(self, client: int | None) -> State:
        """The state_dict of a client's own model, or of the global one where `client` is None.

        Raises:
            BadInput: there is no such model.
        """
        per_client, clients = self.server.method.evaluate == "clients", self.config.clients
        if client is None and per_client:
            raise BadInput(
                f"{self.folder.name}: the trained models of {self.config.method.name} are the clients' "
                f"own; choose one with --client 0 to {clients - 1}"
            )
        if client is None:
            return self.server.global_state()
        if not per_client:
            raise BadInput(
                f"{self.folder.name}: the trained model of {self.config.method.name} is the federated "
                "one; leave out --client"
            )
        if not 0 <= client < clients:
            raise BadInput(f"{self.folder.name}: clients are 0 to {clients - 1}, got {client}")
        round_ = self.server.met.get(client, 0)
        memory = client_memory(self.folder / CHECKPOINT, self.folder.name, repair=False)
        try:
            kept = memory.read(client, round_) if round_ else {}
        except Damaged as error:
            raise BadInput(f"{error}; run the cell again for the model of client {client}") from error
        return {**self.server.global_state(), **kept.get("model", {})}

    def draw(
        self,
        client: int | None,
        images: int,
        seed: int,
        label: int | None = None,
        on_frame: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Images of a model, uint8, shape (images, channels, height, width), by the cell's own sampler.

        Args:
            client: whose own model to draw from; None for the global one.
            images: how many.
            seed: decides the images.
            label: of every image of a conditional model; None for each label in turn.
            on_frame: is given the images after each denoising step.

        Raises:
            BadInput: there is no such model, or it knows no such label.
            Diverged: the model's images are not finite.
        """
        labels = cycle_labels(self.config, images, self.classes)
        if label is not None:
            if labels is None:
                raise BadInput(f"{self.folder.name}: its model knows no labels; leave out --label")
            if not 0 <= label < self.classes:
                raise BadInput(f"{self.folder.name}: labels are 0 to {self.classes - 1}, got {label}")
            labels = torch.full_like(labels, label)
        model = "the global model" if client is None else f"the model of client {client}"
        return draw_images(
            self.module,
            DEVICE,
            self.state(client),
            self.config,
            images,
            seed,
            labels,
            f"{self.folder.name}: {model}",
            on_frame=on_frame,
        )


def open_cell(folder: Path, trust: bool = False) -> FinishedCell:
    """Opens the cell in a folder such as `runs/demo/<cell>`.

    Args:
        folder: of the cell, which may come from somebody else.
        trust: whether its configuration may run whatever code it names.

    Raises:
        BadInput: no cell is there, it is not completed, or it is not trusted and would run other code than
            that of fedlight, diffusers and torch.
    """
    status = (read_result(folder) or {}).get("status")
    if status != "completed":
        raise BadInput(f"{folder} holds no completed cell" + (f": it is {status}" if status else ""))
    received = read_config(folder / "config.yaml")
    if not trust:
        try:
            check_targets(received)
        except BadInput as error:
            raise BadInput(f"{folder}: {error}; --trust lets it, so know where the cell is from") from error
    config = validate(OmegaConf.create(received))
    classes = len({label for _, label, _ in CellFiles(folder).partition})
    module, slices = make_module(config, classes)
    server = make_server(folder.name, config, module, slices, make_algorithm(config), Codec())
    server.resume(ServerCheckpoint(folder / CHECKPOINT, folder.name, repair=False))
    if server.round != config.rounds:
        raise BadInput(f"{folder / CHECKPOINT} is damaged; run the cell again for its models")
    return FinishedCell(folder, config, module, server, classes)
