"""What a cell is built of: data, model, method, algorithm, Trainer and evaluator, all checked."""

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from hydra.utils import instantiate
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities import registry
from lightning.fabric.utilities.warnings import disable_possible_user_warnings
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor

from fedlight.config import TRAINER_ARGUMENTS, CellConfig
from fedlight.data.client_data import ClientData, Sampling
from fedlight.data.dataset import Dataset, Images
from fedlight.data.partition import Indices, count_labels, pool
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.depthwise import use_plain_layers
from fedlight.diffusion.sampling import check_sampler
from fedlight.evaluation.evaluator import Evaluator
from fedlight.evaluation.extractor import Extractor, check_classifier, make_classifier, make_inception
from fedlight.evaluation.memorisation import CopyCheck
from fedlight.evaluation.reference import make_reference
from fedlight.evaluation.scores import check_budget
from fedlight.evaluation.weights import find_weights
from fedlight.experiment.evaluate import check_drawn, draw_and_score
from fedlight.experiment.extensions import make_extension
from fedlight.experiment.guarantee import (
    EXAMPLE,
    calibrated,
    check_privacy,
    make_mechanism,
    make_participation,
    make_private_training,
)
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.client import ClientSetup
from fedlight.federation.codec import Codec
from fedlight.federation.cohort import cohort_size
from fedlight.federation.federator import on_cpu
from fedlight.federation.learning_rate import rate
from fedlight.federation.method import Method
from fedlight.federation.server import Server
from fedlight.federation.site import Site
from fedlight.federation.slices import SliceMap, buffer_names
from fedlight.federation.transport.inline import Inline
from fedlight.federation.transport.processes import Processes
from fedlight.federation.transport.transport import Transport, TransportContext
from fedlight.runtime.errors import BadInput, format_error
from fedlight.runtime.machine import CORES, FULL, best_precision
from fedlight.runtime.memory import keep_freed_memory
from fedlight.runtime.seeds import derive_seed

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
disable_possible_user_warnings()
warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
registry.entry_points = cache(registry.entry_points)  # type: ignore[assignment]  # each Trainer asks: 15 ms
os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # lightning sets it: each step looks for NVML, 0.3 ms

CHECKPOINT = "checkpoint"  # in a cell's folder


@dataclass(frozen=True)
class Components:
    """What a cell is built of, all of it checked before anything is written."""

    config: CellConfig
    dataset: Dataset
    shares: list[Indices]
    module: DDPM
    slices: SliceMap
    method: Method
    algorithm: FedAvg
    codec: Codec
    make_trainer: Callable[..., Trainer]
    device: torch.device
    evaluator: Evaluator | None

    @property
    def room(self) -> int:
        """How many clients may train, or batches be denoised, at once in the cell."""
        return worker_room(self.config, self.device)

    def training_data(self) -> tuple[Tensor, Tensor | None]:
        """Pixels of the training images on the device, and their labels where the model takes them."""
        train, conditional = self.dataset.train, self.config.model.conditional
        labels = torch.from_numpy(train.labels).to(self.device) if conditional else None
        return train.pixels.to(self.device), labels

    def site(
        self, folder: Path, callbacks: Sequence[Callback] = (), on_step: Callable[[], None] = lambda: None
    ) -> Site:
        """The site of this process, where the cell's clients train.

        Args:
            folder: of the cell.
            callbacks: of every client's Trainer, beside the Federator.
            on_step: called after every denoising step, and may end the cell.
        """
        pixels, labels = self.training_data()
        shares = [pool(self.shares)] if self.method.pool else self.shares

        def evaluate(
            state: dict[str, Tensor], round_: int, client: int
        ) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
            drawn = draw_and_score(self, state, round_, client, on_step)
            return drawn.metrics, drawn.to_groups()

        optimizer, privacy = self.config.optimizer, self.config.privacy
        private_training = make_private_training(self.config, shares, folder / CHECKPOINT)
        poisson: Sampling | None = None
        if private_training and privacy:
            poisson = "secret" if privacy.secure_noise else "seeded"
        setup = ClientSetup(
            seed=self.config.seed,
            module=self.module,
            slices=self.slices,
            method=self.method,
            algorithm=self.algorithm,
            codec=self.codec,
            data=lambda client: ClientData(
                pixels, shares[client], self.config.data.batch_size, labels, poisson
            ),
            make_trainer=lambda own: self.make_trainer(callbacks=[*own, *callbacks]),
            evaluate=evaluate,
            rate=partial(
                rate, rounds=self.config.rounds, warmup=optimizer.warmup, cosine=optimizer.decay == "cosine"
            ),
            privacy=make_mechanism(self.config),
            private_training=private_training,
        )
        return Site(folder.name, setup, folder / CHECKPOINT)

    def transport(
        self,
        folder: Path,
        here: Site,
        server: Server,
        done: Callable[[], None],
        check: Callable[[], None],
        ending: ExitStack,
    ) -> Transport:
        """What carries the messages of the cell; CENTRAL trains where the server is."""
        config = self.config
        cohort = cohort_size(config.clients, config.fraction)
        make_site = SiteMaker(config, folder.absolute())
        context = TransportContext(
            here,
            make_site,
            cohort,
            self.room,
            done,
            check,
            ending,
            admit=server.admit,
            admit_scores=partial(check_drawn, config=config),
            forget=server.forget,
            unsent=server.unsent,
        )
        if self.method.pool or config.rounds == 0:
            return Inline(context)
        if config.transport is None:
            return Processes(context)
        transport: Transport = make_extension(
            "transport", config.transport.model_dump(by_alias=True), context
        )
        return transport


@dataclass(frozen=True)
class SiteMaker:
    """Makes the site of a cell in another process of this machine."""

    config: CellConfig
    folder: Path

    def __call__(self) -> Site:
        return build(self.config).site(self.folder)


def build(config: CellConfig) -> Components:
    """Loads the data, deals it to the clients, and makes all that a cell needs.

    From here on torch uses as many threads as the cell asks for: its sums depend on them.

    Raises:
        BadInput: some component cannot be made as asked, or they do not fit each other.
    """
    keep_freed_memory()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(config.trainer.threads or CORES)
    whole = load_data(config)
    components = assemble(config, whole)
    if not config.evaluation.samples:
        return components
    return replace(components, evaluator=make_evaluator(config, whole, components))


_loaded: tuple[str, Dataset] | None = None  # by `check` last, and the configuration of it


def check(config: CellConfig, elsewhere: bool) -> Components | None:
    """Builds a cell as a trial, all but what its scores need: nothing is written or trained.

    Args:
        config: of the cell.
        elsewhere: the cell will run on another machine, which may have data and devices that this one lacks.

    Returns:
        What was built; None where its data are not here.

    Raises:
        BadInput: some component cannot be made as asked, or they do not fit each other.
    """
    global _loaded
    if elsewhere:
        trainer = config.trainer.model_copy(update={"accelerator": "cpu"})
        config = config.model_copy(update={"trainer": trainer})
    asked = config.data.model_dump_json()
    if _loaded is None or _loaded[0] != asked:
        try:
            _loaded = asked, load_data(config)
        except BadInput:
            if elsewhere:
                return None
            raise
        if elsewhere:  # a cell on another machine writes its notes to a log there
            announce(_loaded[1])
    components = assemble(config, _loaded[1])
    if config.evaluation.samples:
        check_evaluation(config, components.dataset)
    return components


def assemble(config: CellConfig, whole: Dataset) -> Components:
    """What a cell is built of, but its evaluator."""
    dataset = replace(whole, train=whole.train.first(config.data.limit))
    deal = instantiate(config.partition.deal, _partial_=True)
    try:
        shares = deal(dataset.train.labels, config.clients)
    except TypeError as error:
        raise BadInput(f"partition: {error}") from error

    module, slices = make_module(config, len(dataset.classes))
    method = config.method.resolve(slices.names)
    config = calibrated(config, shares, method)
    make_trainer = _trainer_factory(config)
    _check_trainer_values(config, [len(pool(shares))] if method.pool else [len(share) for share in shares])
    try:
        device = make_trainer().strategy.root_device
        module.configure_optimizers()
    except Exception as error:  # each library has errors of its own
        raise BadInput(f"optimizer or trainer: {error or type(error).__name__}") from error
    _try_unet(config, module)
    if config.privacy and config.privacy.name == EXAMPLE:
        use_plain_layers(module)
    if config.trainer.compile:
        module.unet.compile()
    algorithm = make_algorithm(config)
    check_privacy(config, method, algorithm, slices, module.state_dict())
    codec = make_codec(config, method, slices.buffers)
    return Components(
        config, dataset, shares, module, slices, method, algorithm, codec, make_trainer, device, None
    )


def _try_unet(config: CellConfig, module: DDPM) -> None:
    """Raises BadInput where the UNet does not predict a noise of the shape and type of an image."""
    x_t = torch.zeros(1, *config.data.shape)
    labels = {"class_labels": torch.zeros(1, dtype=torch.int64)} if config.model.conditional else {}
    backbone = f"model.unet {config.model.unet.get('_target_')}"
    try:
        with torch.no_grad():
            predicted = module.unet(x_t, 0, **labels).sample
        found = predicted.dtype, tuple(predicted.shape[1:])
    except BadInput:
        raise
    except Exception as error:  # it may be a user's own
        call = f"unet(x_t, t).sample with x_t of {x_t.dtype} and shape (n, {config.data.shape})"
        shapes = isinstance(error, RuntimeError)  # as where images are halved and do not fit together again
        hint = f"; it may need another data.image_size than {config.data.image_size}" if shapes else ""
        raise BadInput(f"{backbone}, called as {call}: {format_error(error)}{hint}") from error
    if found != (x_t.dtype, config.data.shape):
        raise BadInput(
            f"{backbone} predicts {found[1]} of {found[0]} for images of {config.data.shape} of {x_t.dtype}"
        )


def make_server(
    cell: str,
    config: CellConfig,
    module: DDPM,
    slices: SliceMap,
    algorithm: FedAvg,
    codec: Codec,
    checkpoint: Path | None = None,
) -> Server:
    """The server of a cell before its first round; `checkpoint` is the folder where it notes its releases."""
    participation = make_participation(config)
    privacy = make_mechanism(config, checkpoint)
    method, initial = config.method.resolve(slices.names), on_cpu(module.state_dict())
    decay = config.model.ema_decay if _averages_rounds(config) else None
    return Server(cell, method, slices, initial, participation, algorithm, codec, decay, privacy)


def make_algorithm(config: CellConfig) -> FedAvg:
    """The algorithm that the configuration names; FedAvg where it names none."""
    if config.algorithm is None:
        return FedAvg()
    algorithm = make_extension("algorithm", config.algorithm.model_dump(by_alias=True))
    if not isinstance(algorithm, FedAvg):
        raise BadInput(f"algorithm must be a subclass of FedAvg, got {type(algorithm).__name__}")
    return algorithm


def make_codec(config: CellConfig, method: Method, buffers: Collection[str]) -> Codec:
    """What encodes the slices; without a transform, and inside CENTRAL, values are sent uncompressed.

    Args:
        config: of the cell.
        method: resolved over the slices.
        buffers: names that are sent uncompressed in any case.

    Raises:
        BadInput: a client would report the delta of a slice that it does not receive.
    """
    if config.transform is None or method.pool:
        return Codec()
    if unsent := [slice_ for slice_ in method.uplink if slice_ not in method.downlink]:
        raise BadInput(
            f"transform={config.transform.name} encodes differences to what a client received, and method "
            f"{method.name} does not send {', '.join(unsent)} down"
        )
    up, down = (
        [make_extension("transform", stage) for stage in stages]
        for stages in (config.transform.up, config.transform.down)
    )
    return Codec(up, down, config.transform.seeded_start, buffers)


def load_data(config: CellConfig) -> Dataset:
    """The whole data set, whatever `data.limit` says.

    Raises:
        BadInput: it cannot be had, or its images are not of the shape that the configuration says.
    """
    source = config.data.source
    more: dict[str, Any] = {"skip_unreadable": True} if config.data.skip_unreadable else {}
    if config.data.range != "type":
        more["range"] = config.data.range
    dataset = make_extension("data", source, **more)
    if not isinstance(dataset, Dataset):
        raise BadInput(f"data {source['_target_']} must return a Dataset, got {type(dataset).__name__}")
    shape = config.data.shape
    if tuple(dataset.train.pixels.shape[1:]) != shape:
        raise BadInput(
            f"data.channels and data.image_size say {shape}, but {config.data.name} holds images of "
            f"{tuple(dataset.train.pixels.shape[1:])} (channels, height, width)"
        )
    return dataset.numbered_by(config.data.classes) if config.data.classes else dataset


def announce(dataset: Dataset) -> None:
    """Prints the notes of a data set on stderr, a line each."""
    for note in dataset.notes:
        print(f"fedlight: {note}", file=sys.stderr)


def make_module(config: CellConfig, classes: int) -> tuple[DDPM, SliceMap]:
    """The client model with its first weights, which the cell's seed decides, and its slice map.

    Args:
        config: of the cell.
        classes: of the data; a conditional model has a label for each, and one more for none.

    Raises:
        BadInput: the model cannot be made as asked, or a parameter is in no slice or in two.
    """
    if config.model.exchange_ema and config.model.ema_decay is None:
        raise BadInput(
            "model.exchange_ema=true exchanges a moving average, and there is none: set model.ema_decay to a "
            "number between 0 and 1, or leave model.exchange_ema out"
        )
    seed_everything(derive_seed(config.seed, "model"), verbose=False)
    schedule = instantiate(config.model.schedule)
    check_sampler(config.evaluation.sampler, config.evaluation.steps, schedule)
    slices, labels = config.model.slices, {}
    if config.model.conditional:
        if classes < 2:
            raise BadInput(
                "model.conditional=true needs labels, and all images of the data set are of one class"
            )
        chosen = config.model.label_slice or next(iter(slices))
        if chosen not in slices:
            raise BadInput(f"model.label_slice must be one of {', '.join(slices)}, got {chosen}")
        slices, labels = (
            {**slices, chosen: [*slices[chosen], "class_embedding"]},
            {"num_class_embeds": classes + 1},
        )
    elif config.evaluation.guidance != 1:
        raise BadInput(f"evaluation.guidance={config.evaluation.guidance} needs model.conditional=true")
    unet = make_extension("model.unet", config.model.unet, _convert_="all", **labels)
    if not isinstance(unet, ModelMixin):
        raise BadInput(f"model.unet must be a diffusers model (ModelMixin), got {type(unet).__name__}")
    module = DDPM(
        unet,
        schedule,
        loss=config.model.loss,
        optimizer=instantiate(
            config.optimizer.model_dump(by_alias=True, exclude={"warmup", "decay"}), _partial_=True
        ),
        slices=slices,
        ema_decay=None if _averages_rounds(config) else config.model.ema_decay,
        exchange_ema=config.model.exchange_ema,
        snr_gamma=config.model.snr_gamma,
        label_dropout=config.model.label_dropout if config.model.conditional else None,
    )
    return module, SliceMap.build(module.slices, module.state_dict(), module.private, buffer_names(module))


def _averages_rounds(config: CellConfig) -> bool:
    """Whether a moving average is the server's, over rounds; clients keep one over steps otherwise."""
    return config.method.evaluate == "global" and not config.model.exchange_ema


def precision(config: CellConfig) -> str:
    """What the clients' Trainers are given, as Lightning names it; on a CPU 16-mixed becomes bf16-mixed."""
    asked = config.trainer.precision
    return best_precision(config.trainer.accelerator) if asked == "auto" else asked


def worker_room(config: CellConfig, device: torch.device) -> int:
    """How many processes may train clients at once; the result does not depend on it.

    Args:
        config: of the cell; `trainer.workers=null` fills a CPU's cores, and leaves a GPU to one process.
        device: that the clients train on.
    """
    room = CORES // (config.trainer.threads or CORES) if device.type == "cpu" else 1
    return config.trainer.workers or max(1, room)


def check_evaluation(config: CellConfig, dataset: Dataset) -> None:
    """Raises BadInput where the extractor does not fit the data, or images are too few."""
    asked = config.evaluation
    reference = dataset.train if asked.reference == "train" else dataset.test
    check_budget(asked.samples, len(reference), asked.reference, asked.extractor)
    if asked.extractor == "classifier":
        check_classifier(len(dataset.classes), config.data.image_size)


def make_evaluator(config: CellConfig, whole: Dataset, components: Components) -> Evaluator:
    """The evaluator of the cell's images: extractor and reference, from the cache or made now.

    Args:
        config: of the cell.
        whole: all images, which the classifier learns from.
        components: of the cell; its training images, not all of them, are what is compared with.

    Raises:
        BadInput: the extractor does not fit the data, its weights are missing, or images are too few.
    """
    asked, dataset = config.evaluation, components.dataset
    check_evaluation(config, dataset)
    splits = {"train": dataset.train, "test": dataset.test}
    extractor = make_extractor(config, whole, components.device)
    shares = [pool(components.shares)] if components.method.pool else components.shares
    held = count_labels(dataset.train.labels, shares, len(dataset.classes)) > 0
    references = {
        split: make_reference(images.pixels, extractor, asked.cache)
        for split, images in splits.items()
        if split == asked.reference or asked.memorisation
    }
    copies = None
    if asked.memorisation:
        copies = CopyCheck(references["train"].features.values, references["test"].features.values)
    labels = torch.from_numpy(splits[asked.reference].labels)
    return Evaluator(extractor, references[asked.reference], labels, held, copies)


def make_extractor(config: CellConfig, whole: Dataset, device: torch.device) -> Extractor:
    """The feature extractor that `evaluation.extractor` names."""
    asked = config.evaluation
    if asked.extractor == "inception":
        return make_inception(find_weights(asked.weights, asked.cache), device)
    return make_classifier(
        config.data.name,
        _labelled(whole.train),
        _labelled(whole.test),
        len(whole.classes),
        asked.cache,
        device,
    )


def _labelled(images: Images) -> tuple[Tensor, Tensor]:
    return images.pixels, torch.from_numpy(images.labels)


def _trainer_factory(config: CellConfig) -> Callable[..., Trainer]:
    """Makes the Trainer of one local update; only TRAINER_ARGUMENTS are the user's to set."""
    if unknown := sorted((config.trainer.model_extra or {}).keys() - TRAINER_ARGUMENTS):
        raise BadInput(
            f"trainer.{unknown[0]} cannot be set: of the arguments of lightning.Trainer a client takes "
            f"{', '.join(sorted(TRAINER_ARGUMENTS))}"
        )
    for name in [name for name in os.environ if name.startswith("PL_TRAINER_")]:
        del os.environ[name]  # Lightning's defaults of arguments, such as num_nodes, which no cell's id has
    asked = config.trainer.model_dump(exclude={"threads", "compile", "workers"})
    asked["precision"] = precision(config)
    decided: dict[str, Any] = {
        "max_epochs": config.epochs,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [LightningEnvironment()],  # a client's Trainer joins no SLURM world
    }
    fused = (config.optimizer.model_extra or {}).get("fused")
    if fused and asked.get("gradient_clip_val") and asked["precision"] != FULL:
        raise BadInput(
            "trainer.gradient_clip_val in mixed precision needs an optimizer that is not fused: add "
            "optimizer.fused=false"
        )
    if fused and config.algorithm and asked["precision"] == "16-mixed":
        raise BadInput(
            "algorithm in 16-mixed precision needs an optimizer that is not fused, which hides the scale of "
            "gradients: add optimizer.fused=false"
        )
    return partial(Trainer, **asked, **decided)


def _check_trainer_values(config: CellConfig, sizes: Sequence[int]) -> None:
    """Raises BadInput where a client would take no step.

    Args:
        config: of the cell.
        sizes: images of each client; 0 where they are not here.
    """
    values = config.trainer.model_extra or {}
    for name in ("accumulate_grad_batches", "max_steps"):
        value = values.get(name, 1)
        unlimited = name == "max_steps" and value == -1
        if not (type(value) is int and value > 0) and not unlimited:
            raise BadInput(f"trainer.{name} must be a whole number of at least 1, got {value}")
    limit = values.get("limit_train_batches")
    least = min((-(-size // config.data.batch_size) for size in sizes if size), default=None)
    if limit is None or (type(limit) is int and limit > 0):
        return
    if type(limit) is not float or not 0 < limit <= 1:
        raise BadInput(
            "trainer.limit_train_batches must be a share above 0 and up to 1.0, or a number of batches, got "
            f"{limit}"
        )
    if least is not None and limit * least < 1:
        raise BadInput(
            f"trainer.limit_train_batches={limit} leaves no batch to a client that has {least} an epoch: it "
            f"must be at least {math.ceil(1000 / least) / 1000}"
        )
