"""What a cell is built of: data, clients' shares, model, method, Trainer and judge, all checked."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from diffusers import ModelMixin
from hydra.utils import instantiate
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities import registry
from lightning.fabric.utilities.warnings import disable_possible_user_warnings
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import DictConfig
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.data.client_data import ClientData
from fedlight.data.dataset import Dataset, Images
from fedlight.data.partition import Indices, pool
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.sampling import check_sampler
from fedlight.evaluation.evaluator import Judge
from fedlight.evaluation.extractor import Extractor, make_classifier, make_inception
from fedlight.evaluation.memorisation import CopyCheck
from fedlight.evaluation.reference import make_reference
from fedlight.evaluation.scores import check_budget
from fedlight.evaluation.weights import find_weights
from fedlight.federation.cohort import Task, participant_count
from fedlight.federation.federator import Federator
from fedlight.federation.method import Method
from fedlight.federation.rounds import local_update
from fedlight.federation.slices import SliceMap
from fedlight.runtime.cores import CORES
from fedlight.runtime.errors import BadInput
from fedlight.runtime.memory import keep_freed_memory
from fedlight.runtime.precision import FULL, best_precision
from fedlight.runtime.seeds import derive_seed

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
disable_possible_user_warnings()
warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
registry.entry_points = cache(registry.entry_points)  # type: ignore[assignment]  # each Trainer asks: 15 ms


@dataclass(frozen=True)
class Parts:
    """What a cell is built of, all of it checked before anything is written."""

    dataset: Dataset
    shares: list[Indices]
    module: DDPM
    slices: SliceMap
    method: Method
    make_trainer: Callable[..., Trainer]
    device: torch.device
    judge: Judge | None

    def updater(
        self, federator: Federator, settings: CellConfig, callbacks: Sequence[Callback]
    ) -> Callable[[Task], None]:
        """What does the local update of a task on the client's own data, under the federator's eyes."""
        pixels = self.dataset.train.pixels.to(self.device)
        shares = [pool(self.shares)] if self.method.pool else self.shares
        return partial(
            local_update,
            federator=federator,
            seed=settings.seed,
            module=self.module,
            data=lambda client: ClientData(pixels, shares[client], settings.data.batch_size),
            make_trainer=partial(self.make_trainer, callbacks=[federator, *callbacks]),
        )


def build(config: DictConfig, settings: CellConfig) -> Parts:
    """Loads the data, deals it to the clients, and makes model, slice map, Trainer and judge.

    From here on torch uses as many threads as the cell asks for: its sums depend on them.

    Raises:
        BadInput: some part cannot be made as asked, or the parts do not fit each other.
    """
    keep_freed_memory()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(settings.trainer.threads or CORES)
    whole = load_data(config, settings)
    dataset = Dataset(whole.train.first(settings.data.limit), whole.test, whole.classes)
    shape = image_shape(settings)
    deal = instantiate(config.partition.deal, _partial_=True)
    try:
        shares = deal(dataset.train.labels, settings.clients)
    except TypeError as error:
        raise BadInput(f"partition: {error}") from error

    module, slices = make_module(config, settings)
    method = settings.method.resolve(slices.names)
    make_trainer = _trainer_factory(settings)
    try:
        device = make_trainer().strategy.root_device
        module.configure_optimizers()
        with torch.no_grad():
            predicted = module.unet(torch.zeros(1, *shape), 0).sample
    except Exception as error:  # each library has errors of its own
        raise BadInput(f"model, optimizer or trainer: {error}") from error
    if predicted.shape != (1, *shape):
        raise BadInput(f"model.unet predicts {tuple(predicted.shape[1:])} for images of {shape}")
    if settings.trainer.compile:
        module.unet.compile()
    judge = make_judge(settings, whole, dataset, device) if settings.evaluation.samples else None
    return Parts(dataset, shares, module, slices, method, make_trainer, device, judge)


def load_data(config: DictConfig, settings: CellConfig) -> Dataset:
    """The whole data set, whatever `data.limit` says.

    Raises:
        BadInput: it cannot be had, or its images are not of the shape that the configuration says.
    """
    try:
        dataset: Dataset = instantiate(config.data.source)
    except OSError as error:
        raise BadInput(f"data: {error}") from error
    shape = image_shape(settings)
    if tuple(dataset.train.pixels.shape[1:]) != shape:
        raise BadInput(
            f"data.channels and data.image_size say {shape}, but {settings.data.name} holds images of "
            f"{tuple(dataset.train.pixels.shape[1:])} (channels, height, width)"
        )
    return dataset


def image_shape(settings: CellConfig) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    return settings.data.channels, settings.data.image_size, settings.data.image_size


def make_module(config: DictConfig, settings: CellConfig) -> tuple[DDPM, SliceMap]:
    """The client model with its first weights, which the cell's seed decides, and its slice map.

    Raises:
        BadInput: the model cannot be made as asked, or a parameter is in no slice or in two.
    """
    seed_everything(derive_seed(settings.seed, "model"), verbose=False)
    schedule = instantiate(config.model.schedule)
    check_sampler(settings.evaluation.sampler, settings.evaluation.steps, schedule)
    unet = instantiate(config.model.unet, _convert_="all")
    if not isinstance(unet, ModelMixin):
        raise BadInput(f"model.unet must be a diffusers model (ModelMixin), got {type(unet).__name__}")
    module = DDPM(
        unet,
        schedule,
        loss=settings.model.loss,
        optimizer=instantiate(config.optimizer, _partial_=True),
        slices=settings.model.slices,
        ema_decay=settings.model.ema_decay,
        exchange_ema=settings.model.exchange_ema,
    )
    slices = SliceMap.build(module.slices, module.state_dict(), module.private)
    return module, slices


def precision(settings: CellConfig) -> str:
    """What the clients train in, as Lightning names it."""
    asked = settings.trainer.precision
    return best_precision(settings.trainer.accelerator) if asked == "auto" else asked


def worker_count(settings: CellConfig, device: torch.device) -> int:
    """How many processes train clients at once; the result does not depend on it.

    Args:
        settings: of the cell; `trainer.workers=null` fills a CPU's cores, and leaves a GPU to one process.
        device: that the clients train on.
    """
    participants = 1 if settings.method.pool else participant_count(settings.clients, settings.fraction)
    room = CORES // (settings.trainer.threads or CORES) if device.type == "cpu" else 1
    return max(1, min(settings.trainer.workers or room, participants))


def make_judge(settings: CellConfig, whole: Dataset, dataset: Dataset, device: torch.device) -> Judge:
    """The judge of the cell's images: extractor and reference, from the cache or made now.

    Args:
        settings: of the cell.
        whole: all images, which the classifier learns from.
        dataset: what is compared with; its training images are those of the federation.
        device: to extract features on.

    Raises:
        BadInput: the extractor does not fit the data, its weights are missing, or images are too few.
    """
    asked = settings.evaluation
    pixels = {"train": dataset.train.pixels, "test": dataset.test.pixels}
    check_budget(asked.samples, len(pixels[asked.reference]), asked.reference, asked.extractor)
    if asked.memorisation and len(dataset.test) < 2:
        raise BadInput("evaluation.memorisation compares with test images, and there is only one of them")
    extractor = make_extractor(settings, whole, device)
    references = {
        split: make_reference(pixels[split], extractor, asked.cache)
        for split in pixels
        if split == asked.reference or asked.memorisation
    }
    if not asked.memorisation:
        return Judge(extractor, references[asked.reference])
    copies = CopyCheck(references["train"].features.values, references["test"].features.values)
    return Judge(extractor, references[asked.reference], copies)


def make_extractor(settings: CellConfig, whole: Dataset, device: torch.device) -> Extractor:
    """The feature extractor that `evaluation.extractor` names."""
    asked = settings.evaluation
    if asked.extractor == "inception":
        return make_inception(find_weights(asked.weights, asked.cache), device)
    return make_classifier(
        settings.data.name,
        _labelled(whole.train),
        _labelled(whole.test),
        len(whole.classes),
        asked.cache,
        device,
    )


def _labelled(images: Images) -> tuple[Tensor, Tensor]:
    return images.pixels, torch.from_numpy(images.labels)


def _trainer_factory(settings: CellConfig) -> Callable[..., Trainer]:
    """Makes the Trainer of one local update; what the federation decides is not the user's to set."""
    asked = settings.trainer.model_dump(exclude={"threads", "compile", "workers"})
    asked["precision"] = precision(settings)
    decided: dict[str, Any] = {
        "max_epochs": settings.epochs,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [LightningEnvironment()],  # a client's Trainer joins no SLURM world
    }
    if taken := asked.keys() & (decided.keys() | {"callbacks"}):
        raise BadInput(f"trainer.{min(taken)} cannot be set: the federation decides it")
    fused = (settings.optimizer.model_extra or {}).get("fused")
    if fused and asked.get("gradient_clip_val") and asked["precision"] != FULL:
        raise BadInput(
            "trainer.gradient_clip_val in mixed precision needs an optimizer that is not fused: add "
            "optimizer.fused=false"
        )
    return partial(Trainer, **asked, **decided)
