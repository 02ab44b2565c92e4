"""Checks of a configuration that concern two of its sections: each raises BadInput with the way out."""

from typing import Any

import torch
from diffusers import SchedulerMixin

from fedlight.config import CellConfig
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.sampling import check_sampler
from fedlight.experiment.mechanisms import EXAMPLE
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.fednova import FedNova
from fedlight.federation.algorithms.flexlora import FlexLoRA
from fedlight.federation.mechanism import COUNT_NOISE
from fedlight.federation.messages import State
from fedlight.federation.method import Method
from fedlight.federation.slices import SliceMap
from fedlight.federation.stack import check_stackable
from fedlight.federation.trainer import choose_precision
from fedlight.finetuning.start import LORA, PretrainedStart
from fedlight.runtime.errors import BadInput
from fedlight.runtime.machine import FULL


def check_sampling(config: CellConfig, schedule: SchedulerMixin) -> None:
    """Sections `evaluation` and `model`: sampler, guidance and labelled images."""
    check_sampler(config.evaluation.sampler, config.evaluation.steps, schedule)
    if config.evaluation.guidance != 1 and not config.model.conditional:
        raise BadInput(f"evaluation.guidance={config.evaluation.guidance} needs model.conditional=true")
    if config.evaluation.downstream and not config.model.conditional:
        raise BadInput(
            "evaluation.downstream=true trains a classifier on labelled images: it needs "
            "model.conditional=true"
        )
    if config.evaluation.downstream and not config.evaluation.samples:
        raise BadInput(
            "evaluation.downstream=true trains on the images that are scored, and evaluation.samples=0 "
            "scores none: set evaluation.samples, or evaluation.downstream=false"
        )
    if config.evaluation.bootstrap and not config.evaluation.samples:
        raise BadInput(
            f"evaluation.bootstrap={config.evaluation.bootstrap} resamples the images that are scored, and "
            "evaluation.samples=0 scores none: set evaluation.samples, or evaluation.bootstrap=null"
        )


def check_pretrained(config: CellConfig, start: PretrainedStart, classes: int) -> None:
    """Sections `finetuning`, `model` and `data`: whether the pretrained UNet fits them.

    Args:
        config: of the cell, which sets `finetuning`.
        start: of the cell.
        classes: of the data.
    """
    assert config.finetuning is not None
    unet, latents = start.backbone.unet, start.latents
    if config.model.unet or config.model.schedule:
        raise BadInput(
            f"finetuning={config.finetuning.name} takes the UNet and its noise schedule from "
            f"finetuning.pretrained, and model={config.model.name} has its own: choose model=pretrained"
        )
    if latents and unet.config.in_channels != latents.shape[0]:
        raise BadInput(
            f"finetuning.pretrained: the UNet takes latents of {unet.config.in_channels} channels, and the "
            f"autoencoder makes some of {latents.shape[0]}"
        )
    if latents is None and unet.config.in_channels != config.data.channels:
        raise BadInput(
            f"finetuning.pretrained: the UNet takes images of {unet.config.in_channels} channels, and "
            f"data.channels={config.data.channels}"
        )
    if start.pipeline.has_text:
        if not config.model.conditional:
            raise BadInput(
                "finetuning.pretrained: the UNet is conditioned on text, of which each class has a prompt: "
                "set model.conditional=true"
            )
        return
    labels = getattr(unet.config, "num_class_embeds", None)
    if labels and latents:
        raise BadInput(
            "finetuning.pretrained: the UNet denoises latents and is conditioned on class labels, for which "
            "diffusers has no pipeline: give one without labels, or one that is conditioned on text"
        )
    if config.model.conditional and labels != classes + 1:
        has = f"has {labels}" if labels else "is not conditioned on labels"
        raise BadInput(
            f"model.conditional=true needs a pretrained UNet with {classes + 1} class embeddings, one for "
            f"each of the {classes} classes and one for no label, and that of finetuning.pretrained {has}"
        )
    if labels and not config.model.conditional:
        raise BadInput(
            "finetuning.pretrained: the UNet is conditioned on class labels: set model.conditional=true"
        )


def check_products(config: CellConfig, algorithm: FedAvg) -> None:
    """Sections `algorithm` and `finetuning`: products of factors need both factors."""
    tuning = config.finetuning
    if isinstance(algorithm, FlexLoRA) and (tuning is None or tuning.name != LORA or tuning.train == "b"):
        raise BadInput(
            "algorithm=flexlora averages the products of adapters: it needs finetuning=lora with "
            "finetuning.train=both"
        )


def check_ranks(config: CellConfig, algorithm: FedAvg) -> None:
    """Sections `finetuning` and all others: whether clients can have adapters of several ranks."""
    ranks = config.finetuning.client_ranks if config.finetuning else ()
    if not ranks:
        return
    rank = f"finetuning.rank=[{','.join(map(str, ranks))}]"
    if len(ranks) != config.clients:
        raise BadInput(
            f"{rank} has {len(ranks)} ranks, and clients={config.clients}: give one rank for each client, or "
            "one number for all"
        )
    requirements: dict[str, Any] = {
        f"a method whose clients train: method={config.method.name} trains one model on all images": (
            config.method.pool
        ),
        "aggregation=none: secure aggregation adds up vectors of equal length": config.aggregation,
        "privacy=example or none: the size of an update would reveal which clients take part, and what a "
        "client lacks would count in its clipped norm": config.privacy and config.privacy.name != EXAMPLE,
        "another algorithm than fednova, which would divide what a client lacks by its steps": isinstance(
            algorithm, FedNova
        ),
    }
    for requirement, violated in requirements.items():
        if violated:
            raise BadInput(f"{rank} needs {requirement}; or choose one rank for all clients")


def check_fused_optimizer(config: CellConfig, accelerator: str | None = None) -> None:
    """Sections `optimizer`, `trainer` and `algorithm`: a fused optimizer unscales gradients by itself.

    Args:
        config: of the cell.
        accelerator: in place of the configured one.
    """
    if not (config.optimizer.model_extra or {}).get("fused"):
        return
    precision = choose_precision(config.trainer, accelerator)
    if (config.trainer.model_extra or {}).get("gradient_clip_val") and precision != FULL:
        raise BadInput(
            "trainer.gradient_clip_val in mixed precision needs an optimizer that is not fused: add "
            "optimizer.fused=false"
        )
    if config.algorithm and precision == "16-mixed":
        raise BadInput(
            "algorithm in 16-mixed precision needs an optimizer that is not fused, which hides the scale of "
            "gradients: add optimizer.fused=false"
        )


def check_fuse(
    config: CellConfig, model: DDPM, algorithm: FedAvg, device: torch.device, shape: tuple[int, int, int]
) -> None:
    """Section `trainer` and all others: whether clients can be trained in one computation.

    Args:
        config: of the cell, which sets `trainer.fuse`.
        model: the client model.
        algorithm: of the cell.
        device: that clients train on.
        shape: channels, height and width of what the model denoises.

    Raises:
        BadInput: something cannot be fused.
    """
    requirements: dict[str, Any] = {
        "trainer.compile=false": config.trainer.compile,
        "privacy=client or none: DP-SGD takes the gradient of each image by itself": (
            config.privacy and config.privacy.name == EXAMPLE
        ),
        "another precision than 16-mixed, which skips the step of all clients where one overflows": (
            choose_precision(config.trainer, device.type) == "16-mixed"
        ),
        f"an algorithm whose callbacks are elementwise: {type(algorithm).__name__} does not declare it": (
            type(algorithm).callbacks is not FedAvg.callbacks and not algorithm.elementwise
        ),
        "transport=inline, processes or dask: an institution trains its one client": (
            config.transport and config.transport.name == "flower"
        ),
    }
    for requirement, violated in requirements.items():
        if violated:
            raise BadInput(f"trainer.fuse={config.trainer.fuse} needs {requirement}")
    images = torch.zeros(1, *shape, device=device)
    batch = (images, torch.zeros(1, dtype=torch.int64, device=device)) if config.model.conditional else images
    check_stackable(model.to(device), batch, model.configure_optimizers())


def check_privacy(
    config: CellConfig, noise: float, method: Method, algorithm: FedAvg, slices: SliceMap, first: State
) -> None:
    """Section `privacy` and all others: rejects configurations that void the privacy guarantee.

    Args:
        config: of the cell.
        noise: multiplier of the noise.
        method: resolved over the slices.
        algorithm: of the cell.
        slices: the slice map of the model.
        first: the first state_dict.
    """
    privacy = config.privacy
    if privacy is None:
        return
    requirements: dict[str, Any] = {
        "a finite privacy.clip, or privacy.noise=0": noise and privacy.clip == float("inf")
    }
    if privacy.name == EXAMPLE:
        requirements |= _violated_by_example_privacy(config, slices, first)
    else:
        requirements |= _violated_by_client_privacy(config, noise, method, algorithm, slices, first)
    for requirement, violated in requirements.items():
        if violated:
            raise BadInput(f"privacy={privacy.name} needs {requirement}")


def _violated_by_example_privacy(config: CellConfig, slices: SliceMap, first: State) -> dict[str, Any]:
    members = [name for names in slices.names.values() for name in names if name in slices.buffers]
    running = [name for name in members if first[name].is_floating_point()]
    return {
        "trainer.compile=false": config.trainer.compile,
        f"parameters alone: {', '.join(running)} is a buffer, made of images without noise": running,
    }


def _violated_by_client_privacy(
    config: CellConfig, noise: float, method: Method, algorithm: FedAvg, slices: SliceMap, first: State
) -> dict[str, Any]:
    privacy = config.privacy
    assert privacy is not None
    unsent = [slice_ for slice_ in method.uplink if slice_ not in method.downlink]
    theta = slices.select(method.uplink, first)
    integers = [name for name, tensor in theta.items() if not tensor.is_floating_point()]
    buffers = [name for name in theta if name in slices.buffers]
    undeclared = type(algorithm).report is not FedAvg.report and not algorithm.aux_like(theta)
    at_clients, adaptive = privacy.noise_at == "clients", privacy.clip_quantile is not None
    largest = 2 * COUNT_NOISE * config.fraction * config.clients  # noise that leaves the count its share
    return {
        "a method whose clients report: CENTRAL and LOCAL have none": method.pool or not method.uplink,
        "a method whose clients all report the same slices: USPLIT reveals which clients take part": (
            method.split
        ),
        "a method that exchanges the same in every round: warm_start changes it": method.warm_start,
        f"a method that sends down what clients report: {', '.join(unsent)} is not": unsent,
        f"floating tensors: {', '.join(integers)} holds whole numbers, which noise cannot hide": integers,
        f"parameters alone: {', '.join(buffers)} is a buffer, which noise would spoil": buffers,
        "an algorithm that takes the plain mean of what clients report": (
            type(algorithm).summand is not FedAvg.summand
        ),
        "an algorithm that declares by aux_like what clients report beside the slices": undeclared,
        "privacy.noise_at=server where a transform encodes updates": at_clients and config.transform,
        "privacy.noise_at=server for an adaptive clip": at_clients and adaptive,
        f"noise below {largest:.3g} for an adaptive clip in cohorts so small": adaptive and noise >= largest,
    }
