"""Assembles a cell: each part is made from its own section of the configuration, and checked."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fedlight.config import CellConfig
from fedlight.data import partition
from fedlight.data.dataset import Dataset
from fedlight.data.loading import load
from fedlight.data.partition import Indices
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.depthwise import use_plain_layers
from fedlight.diffusion.model import check_unet, make_model
from fedlight.evaluation.downstream import Downstream
from fedlight.evaluation.factory import make_evaluator
from fedlight.experiment.aggregation_checks import check_aggregation
from fedlight.experiment.checks import (
    check_fused_optimizer,
    check_pretrained,
    check_privacy,
    check_products,
    check_ranks,
    check_sampling,
)
from fedlight.experiment.early_stopping import check_early_stopping
from fedlight.experiment.fusing import choose_fuse
from fedlight.experiment.mechanisms import EXAMPLE, make_aggregation, make_mechanism, make_participation
from fedlight.experiment.parts import CellParts
from fedlight.experiment.privacy_account import noise_multiplier
from fedlight.experiment.scored_models import scored_clients
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.flexlora import FlexLoRA
from fedlight.federation.client_ranks import ClientRanks
from fedlight.federation.codec import Codec
from fedlight.federation.factories import make_algorithm, make_codec
from fedlight.federation.federator import on_cpu
from fedlight.federation.server import Server
from fedlight.federation.slices import SliceMap, buffer_names
from fedlight.federation.trainer import check_steps, make_trainer_factory
from fedlight.finetuning.adapters import rank_dimensions
from fedlight.finetuning.latents import LatentSpace
from fedlight.finetuning.start import make_start
from fedlight.runtime.errors import BadInput
from fedlight.runtime.machine import CORES
from fedlight.runtime.memory import keep_freed_memory


def set_up(
    config: CellConfig,
    dataset: Dataset | None = None,
    client_indices: list[Indices] | None = None,
    noise: float | None = None,
) -> CellParts:
    """Makes and checks all parts of a cell.

    From here on torch uses as many threads as the cell is configured for: its sums depend on them.

    Args:
        config: of the cell.
        dataset: the complete data set, where it is not the configured one.
        client_indices: the images of each client, where they are not those of the configured partition.
        noise: multiplier of the noise, where another process has computed it already.

    Raises:
        BadInput: a part cannot be made of its section, or two parts do not fit each other.
    """
    keep_freed_memory()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(config.trainer.threads or CORES)
    complete = dataset or load(config.data)
    parts = assemble(config, complete, client_indices, noise)
    if not config.evaluation.samples:
        return parts
    evaluator = make_evaluator(
        config.evaluation, config.data.set_name, complete, parts.dataset, parts.training_indices, parts.device
    )
    if config.evaluation.downstream:
        compared = scored_clients(config, frozenset())
        downstream = Downstream(parts.dataset, parts.client_indices, compared, config.evaluation.cache)
        evaluator = replace(evaluator, downstream=downstream)
    return replace(parts, evaluator=evaluator)


def assemble(
    config: CellConfig,
    complete: Dataset,
    client_indices: list[Indices] | None = None,
    noise: float | None = None,
    accelerator: str | None = None,
) -> CellParts:
    """Makes and checks all parts of a cell but its evaluator.

    Args:
        config: of the cell.
        complete: the complete data set.
        client_indices: in place of those of the configured partition.
        noise: in place of the computed multiplier.
        accelerator: in place of the configured one.
    """
    dataset = replace(complete, train=complete.train.first(config.data.limit))
    if client_indices is None:
        train = dataset.train
        client_indices = partition.assign(config.partition, train.labels, config.clients, train.groups)
    algorithm = make_algorithm(config.algorithm)
    check_ranks(config, algorithm)
    model, slices, latents = make_client_model(config, dataset.classes)
    method = config.method.resolve(slices.names)
    codec = make_codec(config.transform, method, slices.buffers, config.finetuning is not None)
    make_trainer = make_trainer_factory(config.trainer, config.epochs, accelerator)
    try:
        device = make_trainer().strategy.root_device
        model.configure_optimizers()
    except Exception as error:  # each library has errors of its own
        raise BadInput(f"optimizer or trainer: {error or type(error).__name__}") from error
    if noise is None:
        noise = noise_multiplier(config, client_indices, method)
    secure = make_aggregation(config, method, slices, algorithm, noise, model.state_dict())
    parts = CellParts(
        config,
        dataset,
        client_indices,
        model,
        slices,
        method,
        algorithm,
        codec,
        noise,
        make_trainer,
        device,
        aggregation=secure,
        latents=latents,
        ranks=client_ranks(config, model),
    )
    sizes = [len(indices) for indices in parts.training_indices]
    check_steps(config.trainer, config.data.batch_size, sizes)
    check_fused_optimizer(config, accelerator)
    check_products(config, algorithm)
    if isinstance(algorithm, FlexLoRA):
        algorithm.ranks = parts.ranks.ranks
    check_early_stopping(config)
    check_unet(model, config.model, parts.denoised_shape)
    check_privacy(config, noise, method, algorithm, slices, model.state_dict())
    if secure:
        check_aggregation(config, secure, method, make_participation(config), model.state_dict(), sizes)
    if config.privacy and config.privacy.name == EXAMPLE:
        use_plain_layers(model)
    fuse = choose_fuse(parts)
    if config.trainer.compile:
        model.unet.compile()
    return replace(parts, fuse=fuse)


class ClientModel(NamedTuple):
    """The model of a client.

    Attributes:
        module: with its first weights.
        slices: its slice map.
        latents: where it denoises; None for images.
    """

    module: DDPM
    slices: SliceMap
    latents: LatentSpace | None


def make_client_model(config: CellConfig, classes: Sequence[str]) -> ClientModel:
    """The client model with its first weights, and its slice map.

    Args:
        config: of the cell.
        classes: the class names of the data.
    """
    start = None
    if config.finetuning:
        start = make_start(
            config.finetuning, config.seed, config.evaluation.cache, classes, config.data.shape
        )
        check_pretrained(config, start, len(classes))
    model = make_model(
        config.model,
        config.optimizer,
        len(classes),
        config.seed,
        _server_averages(config),
        start.backbone if start else None,
    )
    check_sampling(config, model.schedule)
    slices = SliceMap.build(model.slices, model.state_dict(), model.private, buffer_names(model))
    return ClientModel(model, slices, start.latents if start else None)


def make_server(
    cell: str,
    config: CellConfig,
    model: DDPM,
    slices: SliceMap,
    algorithm: FedAvg,
    codec: Codec,
    noise: float,
    checkpoint: Path | None = None,
) -> Server:
    """The server of a cell before its first round; the folder `checkpoint` counts its noisy releases."""
    method, initial = config.method.resolve(slices.names), on_cpu(model.state_dict())
    decay = config.model.ema_decay if _server_averages(config) else None
    privacy = make_mechanism(config, noise, checkpoint)
    return Server(
        cell,
        method,
        slices,
        initial,
        make_participation(config),
        algorithm,
        codec,
        decay,
        privacy,
        make_aggregation(config, method, slices, algorithm, noise, initial),
        client_ranks(config, model),
    )


def make_cell_server(cell: str, parts: CellParts, checkpoint: Path | None = None) -> Server:
    """The server of an assembled cell; `make_server` serves where there are no data to assemble one."""
    return make_server(
        cell, parts.config, parts.model, parts.slices, parts.algorithm, parts.codec, parts.noise, checkpoint
    )


def client_ranks(config: CellConfig, model: DDPM) -> ClientRanks:
    """The part of each adapter of the model that a client has."""
    ranks = config.finetuning.client_ranks if config.finetuning else ()
    return ClientRanks(ranks, rank_dimensions(model.state_dict())) if ranks else ClientRanks()


def _server_averages(config: CellConfig) -> bool:
    """Whether the server keeps a moving average over rounds; otherwise clients keep one over steps."""
    return config.method.evaluate == "global" and not config.model.exchange_ema
