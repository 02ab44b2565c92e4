"""Floating-point operations of a cell: those of one image, counted once, times the images."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from fedlight.config import CellConfig
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.depthwise import use_stacked_layers
from fedlight.experiment.drawing import images_per_model
from fedlight.federation.trainer import count_batches, limit_batches

IMAGES = 2  # of the step that is counted: batch normalisation needs more than one


@dataclass(frozen=True)
class ImageFlops:
    """The floating-point operations of one image; a multiplication and an addition are two.

    Convolutions, matrix products and attention are counted, as `torch.utils.flop_counter` does, without what
    a backward pass computes again; the rest is small beside them.

    Attributes:
        training: forward and backward pass of a training step.
        denoising: one call of the UNet.
    """

    training: float
    denoising: float


def image_flops(module: DDPM, shape: tuple[int, int, int]) -> ImageFlops:
    """Those of a cell's model; no random number of the cell is drawn.

    Args:
        module: the client model.
        shape: of what it denoises: channels, height, width.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            return _count(_without_values(module), shape)
        except (NotImplementedError, RuntimeError):  # a UNet whose path depends on values
            return _count(deepcopy(module), shape)


def _count(module: DDPM, shape: tuple[int, int, int]) -> ImageFlops:
    use_stacked_layers(module, False)
    device = next(module.parameters()).device
    images, labels = torch.zeros(IMAGES, *shape, device=device), None
    if module.label_dropout is not None:
        labels = torch.zeros(IMAGES, dtype=torch.int64, device=device)
    counted = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=counted) as training:
        module.training_step(images if labels is None else (images, labels), 0).backward()
    condition = {} if labels is None else {"class_labels": labels}
    with FlopCounterMode(display=False) as denoising, torch.no_grad():
        module.unet.eval()(images, 0, **condition)
    return ImageFlops(training.get_total_flops() / IMAGES, denoising.get_total_flops() / IMAGES)


def _without_values(module: DDPM) -> DDPM:
    """A copy whose tensors have shapes and no values: on the device `meta`, where operations cost nothing."""
    known: dict[int, Any] = {}  # what deepcopy takes in place of a tensor, by the tensor's id
    for parameter in module.parameters():
        known[id(parameter)] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        known[id(buffer)] = buffer.to("meta")
    return deepcopy(module, known)


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
    epochs, rest = divmod(count_batches(config.trainer, config.epochs, batches), max(1, limited))
    return epochs * min(images, limited * size) + rest * size


def denoised_images(config: CellConfig, models: int) -> int:
    """How often the UNet is called with an image in an evaluation of so many models."""
    guided = config.model.conditional and config.evaluation.guidance != 1
    return models * images_per_model(config) * config.evaluation.steps * (2 if guided else 1)
