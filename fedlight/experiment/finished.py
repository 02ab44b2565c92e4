"""A finished cell, opened for reading: its configuration and its models after the last round."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from torch import Tensor

from fedlight.config import CellConfig, validate
from fedlight.diffusion.ddpm import DDPM
from fedlight.experiment.drawing import cycle_labels, draw_images
from fedlight.experiment.parts import CHECKPOINT
from fedlight.experiment.pipeline import make_pipeline
from fedlight.experiment.setup import make_client_model, make_server
from fedlight.experiment.targets import check_targets
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.codec import Codec
from fedlight.federation.factories import make_algorithm
from fedlight.federation.messages import State
from fedlight.federation.server import Server
from fedlight.federation.site import client_memory
from fedlight.finetuning.adapters import has_adapters, save_adapter
from fedlight.finetuning.latents import LatentSpace
from fedlight.runs.identity import last_round, read_config, read_result
from fedlight.runs.reader import CellFiles
from fedlight.runtime.errors import BadInput, Damaged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class FinishedCell:
    """A completed cell, opened from its folder by `open_cell`; nothing in the folder is changed.

    Attributes:
        folder: of the cell.
        config: its validated configuration.
        module: the client model; its weights are those of the model that was last drawn from.
        server: the server after the last round, with the global model, the ledger and the clients it has met.
        num_classes: the number of classes of the data set.
        latents: where the model denoises; None for images.
    """

    folder: Path
    config: CellConfig
    module: DDPM
    server: Server
    num_classes: int
    latents: LatentSpace | None = None

    def state(self, client: int | None) -> State:
        """The state_dict of a model after the last round, to be loaded into `module`.

        Args:
            client: whose own model, 0..clients-1, where the method evaluates clients' models; None for the
                global model, where it evaluates that.

        Raises:
            BadInput: there is no such model, or the file that holds it is missing or damaged.
        """
        name, clients = self.folder.name, self.config.clients
        if self.server.method.evaluate == "global":
            if client is None:
                return self.server.global_state()
            raise BadInput(
                f"{name}: method {self.config.method.name} trains one global model: leave out client"
            )
        if client is None:
            raise BadInput(
                f"{name}: method {self.config.method.name} trains a model for each client: choose one by "
                f"--client (client=), 0 to {clients - 1}"
            )
        if not 0 <= client < clients:
            raise BadInput(f"{name}: client must be 0 to {clients - 1}, got {client}")
        round_ = self.server.met.get(client, 0)
        memory = client_memory(self.folder / CHECKPOINT, name, repair=False)
        try:
            kept = memory.read(client, round_) if round_ else {}
        except Damaged as error:
            raise BadInput(f"{error}; run the cell again for the model of client {client}") from error
        return self.server.ranks.clear(client, {**self.server.global_state(), **kept.get("model", {})})

    def sample(
        self,
        client: int | None = None,
        images: int = 16,
        label: int | None = None,
        seed: int = 0,
        on_frame: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Draws images from a model by the sampler of the cell's configuration.

        The same arguments give the same images, which are those of the command `fedlight.sample`.

        Args:
            client: whose own model, 0..clients-1, where the method trains a model for each client; None for
                the global model.
            images: number of images, 1 or more.
            label: the class, 0..num_classes-1, that all images of a conditional model are conditioned on;
                None for the classes 0, 1, ... in turn.
            seed: of the images.
            on_frame: receives the images after each denoising step, uint8, on the CPU.

        Returns:
            The images, uint8 in 0..255, shape (images, channels, height, width), on the CPU.

        Raises:
            BadInput: there is no such model, it has no such label, or `images` is below 1.
            Diverged: the model's images are not finite.
        """
        if images < 1:
            raise BadInput(f"images must be 1 or more, got {images}")
        labels = cycle_labels(self.config, images, self.num_classes)
        if label is not None:
            if labels is None:
                raise BadInput(f"{self.folder.name}: the model is not conditional: leave out label")
            if not 0 <= label < self.num_classes:
                raise BadInput(f"{self.folder.name}: label must be 0 to {self.num_classes - 1}, got {label}")
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
            latents=self.latents,
        )

    def model(self, client: int | None = None) -> DiffusionPipeline:
        """A trained model as a pipeline of diffusers, on the CPU; it shares no tensor with the cell.

        Args:
            client: whose own model, as in `sample`; None for the global one.

        Returns:
            A `DDPMPipeline`; for a conditional model a `LabelledDDPMPipeline`, which is called with
            `class_labels`; for a model of latents an `LDMPipeline`, or a `StableDiffusionPipeline`, which is
            called with prompts.

        Raises:
            BadInput: there is no such model.
        """
        self.module.load_state_dict(self.state(client))
        return make_pipeline(deepcopy(self.module), self.config, self.latents)

    def save_adapter(self, folder: Path, client: int | None = None) -> None:
        """Writes the adapters of a model, for `load_lora_weights` of diffusers' pipelines.

        Args:
            folder: to write to.
            client: whose own model, as in `sample`; None for the global one.

        Raises:
            BadInput: there is no such model, or it has no adapters.
        """
        self.module.load_state_dict(self.state(client))
        if not has_adapters(self.module.denoiser):
            raise BadInput(f"{self.folder.name}: the model has no adapters: they come with finetuning=lora")
        save_adapter(folder, self.module.denoiser)


def open_cell(folder: str | Path, trust: bool = False) -> FinishedCell:
    """Opens the completed cell in a folder such as `runs/demo/<cell>`; nothing in the folder is changed.

    Args:
        folder: of the cell.
        trust: whether the cell's configuration may call code other than the permitted targets of fedlight,
            diffusers and torch; true only for a cell whose origin is trusted.

    Raises:
        BadInput: the folder holds no completed cell, its checkpoint is damaged, or its configuration calls
            other code and `trust` is false.
    """
    folder = Path(folder)
    result = read_result(folder) or {}
    status = result.get("status")
    if status != "completed":
        raise BadInput(f"{folder} holds no completed cell" + (f": it is {status}" if status else ""))
    plain = read_config(folder / "config.yaml")
    if not trust:
        try:
            check_targets(plain)
        except BadInput as error:
            raise BadInput(
                f"{folder}: {error}; add --trust (trust=True) if you trust the origin of the cell"
            ) from error
    config = validate(OmegaConf.create(plain))
    classes = list(dict.fromkeys(label for _, label, _ in CellFiles(folder).partition))
    module, slices, latents = make_client_model(config, classes)
    noise = config.privacy.noise if config.privacy else 0.0
    algorithm = make_algorithm(config.algorithm)
    server = make_server(folder.name, config, module, slices, algorithm, Codec(), noise)
    server.resume(ServerCheckpoint(folder / CHECKPOINT, folder.name, repair=False))
    if server.round != last_round(result, config.rounds):
        raise BadInput(f"{folder / CHECKPOINT} is damaged; run the cell again for its models")
    return FinishedCell(folder, config, module, server, len(classes), latents)
