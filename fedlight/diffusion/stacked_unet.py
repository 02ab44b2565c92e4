"""The ConvNeXt UNet of several clients in one computation, each with parameters of its own.

`torch.func.vmap` computes the same from the forward of one client, but splits normalisations and biases into
several operations and copies images between layouts. Here the channels of all clients stand side by side, so
that a convolution or a normalisation of all clients is one call with groups, and nothing is copied.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlight.diffusion.depthwise import DepthwiseConv, convolve_stacked
from fedlight.diffusion.unet import ConvNextUNet, sinusoids


def can_stack(unet: nn.Module) -> bool:
    """Whether `predict` computes this UNet: the ConvNeXt UNet without adapters, which replace its layers."""
    kinds = {type(layer) for layer in unet.modules() if not any(layer.children())}
    plain = {nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding, nn.GELU, nn.GroupNorm, nn.Identity}
    return type(unet) is ConvNextUNet and kinds <= plain | {DepthwiseConv}


def predict(unet: Any, sample: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
    """The predictions of several clients' UNets.

    Args:
        unet: a `ConvNextUNet` whose parameters have a further first dimension, the clients'.
        sample: noisy images x_t, shape (clients, n, channels, size, size).
        timestep: of each image, int64, shape (clients, n).
        class_labels: of each image, int64, shape (clients, n); None for an unconditional model.

    Returns:
        The predicted noise, of the shape of `sample`.
    """
    clients = len(sample)
    waves = sinusoids(timestep.flatten(), unet.config.dim).to(sample.dtype).unflatten(0, timestep.shape)
    first, activation, second = unet.time_mlp
    time = _linear(second, activation(_linear(first, waves)))
    if unet.class_embedding is not None:
        weight = unet.class_embedding.weight
        offsets = torch.arange(clients, device=sample.device)[:, None] * weight.shape[1]
        time = time + F.embedding(class_labels + offsets, weight.flatten(0, 1))
    x = _convolve(unet.init_conv, sample.transpose(0, 1).flatten(1, 2))
    skips = []
    for down in unet.downs:
        skip, x = _stage(down, x, time)
        skips.append(skip)
    x = _bottleneck(unet.mid, x, time)
    for up in unet.ups:
        pair = [part.unflatten(1, (clients, -1)) for part in (x, skips.pop())]
        _, x = _stage(up, torch.cat(pair, dim=2).flatten(1, 2), time)
    return _head(unet.head, x).unflatten(1, (clients, -1)).transpose(0, 1)


def _stage(stage: Any, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    for block in stage.blocks:
        x = _block(block, x, time)
    x = _linear_attention(stage.attention, x)
    return x, _convolve(stage.resample, x)


def _bottleneck(mid: Any, x: Tensor, time: Tensor) -> Tensor:
    return _block(mid.block2, _attention(mid.attention, _block(mid.block1, x, time)), time)


def _head(head: Any, x: Tensor) -> Tensor:
    return _convolve(head.out, _block(head.block, x, None))


def _block(block: Any, x: Tensor, time: Tensor | None) -> Tensor:
    h = convolve_stacked(x, block.depthwise.weight.flatten(0, 1), block.depthwise.bias.flatten())
    if time is not None:
        activation, layer = block.time
        h = h + _linear(layer, activation(time)).transpose(0, 1).flatten(1)[:, :, None, None]
    norm, widen, activation, inner_norm, narrow = block.net
    h = _convolve(narrow, _normalize(inner_norm, activation(_convolve(widen, _normalize(norm, h)))))
    return h + _convolve(block.residual, x)


def _linear_attention(attention: Any, x: Tensor) -> Tensor:
    """Attention over images, as channels by pixels; `LinearAttention.forward` has the formula."""
    to_out, norm = attention.out
    clients, by_head = len(to_out.weight), (attention.heads, -1)
    # (n, clients, width, pixels)
    tokens = _normalize(attention.norm, x).unflatten(1, (clients, -1)).flatten(3)
    weight: Tensor = attention.qkv.weight.flatten(2)  # (clients, 3 * heads * head width, width)
    width = weight.shape[1] // 3
    q, k = (weight[:, : 2 * width] @ tokens).chunk(2, dim=2)
    q = q.unflatten(2, by_head).softmax(dim=3).flatten(2, 3)
    seen = (tokens @ k.softmax(dim=-1).mT).unflatten(3, by_head).transpose(2, 3)
    values = weight[:, 2 * width :].unflatten(1, by_head)
    out: Tensor = to_out.weight.flatten(2).unflatten(2, by_head).transpose(1, 2)
    scale = (width // attention.heads) ** -0.5
    # (n, clients, width, heads * head width)
    answers = ((scale * out @ values) @ seen).transpose(2, 3).flatten(3)
    y = answers @ q + to_out.bias[:, :, None]
    return _normalize(norm, y.flatten(1, 2).unflatten(-1, x.shape[-2:])) + x


def _attention(attention: Any, x: Tensor) -> Tensor:
    clients = len(attention.out.weight)
    tokens = _normalize(attention.norm, x).unflatten(1, (clients, -1)).flatten(3)
    parts: Tensor = attention.qkv.weight.flatten(2) @ tokens
    # (n, clients, heads, head width, pixels)
    q, k, v = parts.unflatten(2, (3, attention.heads, -1)).unbind(2)
    weights = (q.mT @ k * q.shape[3] ** -0.5).softmax(dim=-1)
    seen = (v @ weights.mT).flatten(2, 3)
    y: Tensor = attention.out.weight.flatten(2) @ seen + attention.out.bias[:, :, None]
    return y.flatten(1, 2).unflatten(-1, x.shape[-2:]) + x


def _linear(layer: Any, x: Tensor) -> Tensor:
    """A linear layer of each client; x has shape (clients, n, width)."""
    return torch.baddbmm(layer.bias[:, None], x, layer.weight.mT)


def _convolve(layer: Any, x: Tensor) -> Tensor:
    """A convolution, or none, of each client; x has shape (n, clients * channels, height, width)."""
    if isinstance(layer, nn.Identity):
        return x
    clients, bias = len(layer.weight), layer.bias.flatten()
    if layer.kernel_size == (1, 1):
        images = x.unflatten(1, (clients, -1)).flatten(3)
        y: Tensor = layer.weight.flatten(2) @ images + layer.bias[:, :, None]
        return y.flatten(1, 2).unflatten(-1, x.shape[-2:])
    convolve: Any = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv_transpose2d
    weight = layer.weight.flatten(0, 1)
    output: Tensor = convolve(x, weight, bias, stride=layer.stride, padding=layer.padding, groups=clients)
    return output


def _normalize(norm: Any, x: Tensor) -> Tensor:
    groups = len(norm.weight) * norm.num_groups
    return F.group_norm(x, groups, norm.weight.flatten(), norm.bias.flatten(), norm.eps)
