"""The ConvNeXt UNet of FedDiffuse (arXiv 2406.12575), as a diffusers model."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from fedlight.diffusion.depthwise import DepthwiseConv
from fedlight.runtime.errors import BadInput


@dataclass
class Prediction(BaseOutput):
    """What a UNet of diffusers returns.

    Attributes:
        sample: the predicted noise, shape (n, channels, height, width).
    """

    sample: Tensor


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Embeds time steps, shape (n,), as sines and cosines, float32, shape (n, width)."""
    half = width // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def adapted_weight(layer: Any) -> Tensor:
    """The weight of a layer, with what adapters of peft, which wrap it, add to it."""
    weight: Tensor = layer.weight
    if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
        return weight
    for name in getattr(layer, "active_adapters", ()):
        weight = weight + layer.get_delta_weight(name)
    return weight


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, the time embedding if `time_width` is given, then two normalised 3x3 convolutions."""

    def __init__(self, d_in: int, d_out: int, time_width: int | None = None) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.GELU(), nn.Linear(time_width, d_in)) if time_width else None
        self.depthwise = DepthwiseConv(d_in, 7)
        self.net = nn.Sequential(
            nn.GroupNorm(1, d_in),
            nn.Conv2d(d_in, 2 * d_out, 3, padding=1),
            nn.GELU(),
            nn.GroupNorm(1, 2 * d_out),
            nn.Conv2d(2 * d_out, d_out, 3, padding=1),
        )
        self.residual = nn.Conv2d(d_in, d_out, 1) if d_in != d_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.depthwise(x)
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.net(h) + self.residual(x)


class LinearAttention(nn.Module):
    """Attention linear in the number of pixels (arXiv 1812.01243), after GroupNorm, with a residual.

    A head's output q (k^T v) W_out with v = x W_v is computed as q ((k^T x) (W_v W_out)): no values per pixel
    are computed, only small matrices are split by head, and no image is copied into another layout.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, width)
        self.qkv = nn.Conv2d(width, 3 * heads * head_width, 1, bias=False)
        self.out = nn.Sequential(nn.Conv2d(heads * head_width, width, 1), nn.GroupNorm(1, width))

    def forward(self, x: Tensor) -> Tensor:
        to_out, norm = self.out
        by_head = (self.heads, -1)
        tokens = self.norm(x).flatten(2).mT  # (n, pixels, width)
        to_q, to_k, to_v = adapted_weight(self.qkv).flatten(1).chunk(3)  # (heads * head width, width)
        q = F.linear(tokens, to_q).unflatten(-1, by_head).softmax(dim=-1).flatten(2)
        k = torch.bmm(to_k.expand(len(x), -1, -1), tokens.mT).softmax(dim=-1)  # over pixels
        out = adapted_weight(to_out).flatten(1).mT.unflatten(0, by_head)
        values_out = to_v.unflatten(0, by_head).mT @ out
        seen = (k @ tokens).unflatten(1, by_head)  # (n, heads, head width, width)
        scale = (len(to_q) // self.heads) ** -0.5
        answers = torch.einsum("nhdi,hio->nhdo", seen, scale * values_out).flatten(1, 2)
        return norm(as_image(q @ answers + to_out.bias, x)) + x


class Attention(nn.Module):
    """Full softmax attention over pixels, after GroupNorm, with a residual."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, width)
        self.qkv = nn.Conv2d(width, 3 * heads * head_width, 1, bias=False)
        self.out = nn.Conv2d(heads * head_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.linear(self.norm(x).flatten(2).mT, adapted_weight(self.qkv).flatten(1))
        q, k, v = tokens.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind()
        if x.device.type == "cpu":  # torch's fused kernel is several times slower there in bf16
            out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.out(as_image(out.transpose(1, 2).flatten(2), x)) + x


def as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """Views tokens, shape (n, pixels, width), as an image of the height and width of `like`."""
    return tokens.mT.unflatten(-1, like.shape[-2:])


class Stage(nn.Module):
    """Blocks and linear attention at one resolution, then a change of resolution."""

    def __init__(self, blocks: Iterable[nn.Module], attention: nn.Module, resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention
        self.resample = resample

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features at this stage's own resolution and the resampled ones."""
        for block in self.blocks:
            x = block(x, time)
        x = self.attention(x)
        return x, self.resample(x)


class Bottleneck(nn.Module):
    """Block, full attention, block, at the lowest resolution."""

    def __init__(self, width: int, time_width: int, attention: nn.Module) -> None:
        super().__init__()
        self.block1 = ConvNextBlock(width, width, time_width)
        self.attention = attention
        self.block2 = ConvNextBlock(width, width, time_width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x, time)), time)


class Head(nn.Module):
    """One block without time, then a 1x1 convolution to the predicted noise."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.block = ConvNextBlock(width, width)
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x))


class ConvNextUNet(ModelMixin, ConfigMixin):
    """Predicts the noise eps_theta(x_t, t) in an image (FedDiffuse, arXiv 2406.12575, section 4).

    Args:
        sample_size: height and width of the images, in pixels; a multiple of 2^(stages - 1).
        in_channels: channels of the images and of the prediction.
        dim: base width in channels; even, at least 4. The paper uses the image size.
        dim_mults: width of each stage as a multiple of `dim`, one stage an entry.
        blocks: blocks of each stage.
        heads: attention heads.
        head_width: channels of one attention head.
        num_class_embeds: number of class labels plus one, the last, for no label; None for an unconditional
            model.

    Raises:
        ValueError: the image size cannot be halved often enough, or `dim` is unusable.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        dim: int = 28,
        dim_mults: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        heads: int = 4,
        head_width: int = 32,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        halvings = len(dim_mults) - 1
        multiple = 2 ** max(halvings, 0)
        if halvings < 0 or sample_size % multiple:
            above = -(-sample_size // multiple) * multiple
            sizes = [size for size in (above - multiple, above) if size > 0]
            raise BadInput(
                f"data.image_size: a UNet of {len(dim_mults)} stages (model.unet.dim_mults) halves the image "
                f"{max(halvings, 0)} times, so that the image size must be a multiple of {multiple}, got "
                f"{sample_size}: choose {' or '.join(map(str, sizes))}"
            )
        if dim < 4 or dim % 2:
            raise ValueError(f"model.unet.dim must be an even number of at least 4, got {dim}")
        if min(blocks, heads, head_width, *dim_mults) < 1:
            raise ValueError(
                "model.unet: blocks, heads, head_width and dim_mults must be at least 1, got "
                f"{blocks}, {heads}, {head_width} and {list(dim_mults)}"
            )
        time_width = 4 * dim
        initial = dim // 3 * 2
        widths = [dim * mult for mult in dim_mults]

        def stage(d_in: int, d_out: int, resample: nn.Module) -> Stage:
            blocks_in = [d_in] + [d_out] * (blocks - 1)
            attention = LinearAttention(d_out, heads, head_width)
            return Stage((ConvNextBlock(d, d_out, time_width) for d in blocks_in), attention, resample)

        self.init_conv = nn.Conv2d(in_channels, initial, 7, padding=3)
        self.time_mlp = nn.Sequential(
            nn.Linear(dim, time_width), nn.GELU(), nn.Linear(time_width, time_width)
        )
        self.downs = nn.ModuleList()
        for d_in, d_out in zip([initial, *widths], widths, strict=False):
            last = len(self.downs) == halvings
            halve = nn.Identity() if last else nn.Conv2d(d_out, d_out, 4, stride=2, padding=1)
            self.downs.append(stage(d_in, d_out, halve))
        self.mid = Bottleneck(widths[-1], time_width, Attention(widths[-1], heads, head_width))
        self.ups = nn.ModuleList()
        for d_in, d_out in reversed(list(pairwise(widths))):
            double = nn.ConvTranspose2d(d_in, d_in, 4, stride=2, padding=1)
            self.ups.append(stage(2 * d_out, d_in, double))
        self.head = Head(widths[0], in_channels)
        self.class_embedding = nn.Embedding(num_class_embeds, time_width) if num_class_embeds else None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Prediction | tuple[Tensor]:
        """Predicts the noise.

        Args:
            sample: noisy images x_t, float, shape (n, channels, size, size).
            timestep: t in 0..T-1, one for all images or one per image, shape () or (n,).
            class_labels: int64 in 0..num_class_embeds-1, shape (n,); required by a conditional model.
            return_dict: return a `Prediction`, as diffusers' pipelines expect, not a tuple.

        Returns:
            The predicted noise, of the shape and dtype of `sample`.
        """
        t = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time = self.time_mlp(sinusoids(t, self.config.dim).to(sample.dtype))
        if self.class_embedding is not None:
            time = time + self.class_embedding(class_labels)
        x = self.init_conv(sample)
        skips = []
        for down in self.downs:
            skip, x = down(x, time)
            skips.append(skip)
        x = self.mid(x, time)
        for up in self.ups:
            _, x = up(torch.cat((x, skips.pop()), dim=1), time)
        eps = self.head(x)
        return Prediction(sample=eps) if return_dict else (eps,)
