"""Floating-point operations of a cell: those of one image, counted once, times the images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from fedlight.config import CellConfig
from fedlight.diffusion.model import make_model
from fedlight.diffusion.model_config import ModelConfig, OptimizerConfig
from fedlight.experiment.drawing import images_per_model
from fedlight.federation.trainer import count_batches, limit_batches
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.finetuning.start import make_start

IMAGES = 2  # of the step that is counted: batch normalisation needs more than one


@dataclass(frozen=True)
class ImageFlops:
    """The floating-point operations of one image; a multiplication and an addition are two.

    Convolutions, matrix products and attention are counted, as `torch.utils.flop_counter` does; the rest is
    small beside them.

    Attributes:
        training: forward and backward pass of a training step.
        denoising: one call of the UNet.
    """

    training: float
    denoising: float


def image_flops(config: CellConfig, classes: Sequence[str]) -> ImageFlops:
    """Those of a cell's model, counted on the CPU; no random number of the cell is drawn.

    Args:
        config: of the cell.
        classes: the class names of the data.
    """
    return _count(
        config.model.model_dump_json(by_alias=True),
        config.optimizer.model_dump_json(by_alias=True),
        config.finetuning.model_dump_json() if config.finetuning else None,
        config.evaluation.cache,
        config.data.shape,
        tuple(classes),
    )


@lru_cache(maxsize=16)
def _count(
    model: str,
    optimizer: str,
    finetuning: str | None,
    cache: str,
    shape: tuple[int, int, int],
    classes: tuple[str, ...],
) -> ImageFlops:
    """Those of the model of the sections `model`, `optimizer` and `finetuning`, given as JSON."""
    section, optimizer_section = (
        ModelConfig.model_validate_json(model),
        OptimizerConfig.model_validate_json(optimizer),
    )
    with torch.random.fork_rng(devices=[]):
        backbone = None
        if finetuning:
            finetuning_section = FinetuningConfig.model_validate_json(finetuning)
            start = make_start(finetuning_section, 0, cache, classes, shape)
            backbone, shape = start.backbone, start.latents.shape if start.latents else shape
        module = make_model(section, optimizer_section, len(classes), 0, True, backbone)
        images, labels = torch.zeros(IMAGES, *shape), torch.zeros(IMAGES, dtype=torch.int64)
        counted = {torch.ops.aten.convolution_backward: _convolution_backward}
        with FlopCounterMode(display=False, custom_mapping=counted) as training:
            module.training_step((images, labels) if section.conditional else images, 0).backward()
        condition = {"class_labels": labels} if section.conditional else {}
        with FlopCounterMode(display=False) as denoising, torch.no_grad():
            module.unet.eval()(images, 0, **condition)
    return ImageFlops(training.get_total_flops() / IMAGES, denoising.get_total_flops() / IMAGES)


def _convolution_backward(
    gradient: Sequence[int],
    images: Sequence[int],
    weight: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    wanted: Sequence[bool],
    **others: Any,
) -> int:
    """The operations of a convolution's backward pass, from the shapes of its arguments.

    The gradients with respect to input and weight cost as much as the forward pass each. torch's own formula
    counts every group of a depthwise convolution as a whole one.
    """
    once = conv_flop_count(list(images), list(weight), list(gradient), transposed)
    return once * (int(wanted[0]) + int(wanted[1]))


def trained_images(config: CellConfig, images: int) -> int:
    """The images, repetitions counted, that a local update of a client with so many images trains on.

    Args:
        config: of the cell; `trainer.limit_train_batches` and `trainer.max_steps` shorten an update.
        images: n_k, of the client.
    """
    size = config.data.batch_size
    batches = math.ceil(images / size)
    limited = limit_batches(config.trainer, batches)
    epochs, rest = divmod(count_batches(config.trainer, config.epochs, batches), limited)
    return epochs * min(images, limited * size) + rest * size


def denoised_images(config: CellConfig, models: int) -> int:
    """How often the UNet is called with an image in an evaluation of so many models."""
    guided = config.model.conditional and config.evaluation.guidance != 1
    return models * images_per_model(config) * config.evaluation.steps * (2 if guided else 1)
