"""The ConvNeXt UNet against an independent implementation, its published size, and diffusers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import configured
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedlight.diffusion.unet import ConvNextUNet

PAPER_YAML = Path(__file__).parents[3] / "configs" / "model" / "paper.yaml"


class Weights:
    """The tensors of a state_dict below a name, as the layers that they belong to."""

    def __init__(self, state: Mapping[str, Tensor], name: str = "") -> None:
        self.state, self.name = state, name

    def __truediv__(self, name: str) -> "Weights":
        return Weights(self.state, f"{self.name}{name}.")

    def __contains__(self, name: str) -> bool:
        return any(key.startswith(f"{self.name}{name}.") for key in self.state)

    @property
    def w(self) -> Tensor:
        return self.state[f"{self.name}weight"]

    @property
    def b(self) -> Tensor | None:
        return self.state.get(f"{self.name}bias")

    def conv(self, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, self.w, self.b, **options)

    def linear(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", x, self.w) + self.b

    def norm(self, x: Tensor) -> Tensor:
        """GroupNorm of one group: each image as a whole to mean 0 and variance 1."""
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
        normal = (x - mean) / (variance + 1e-5).sqrt()
        return normal * self.w[:, None, None] + self.b[:, None, None]


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / 2**0.5))


def block(p: Weights, x: Tensor, time: Tensor | None = None) -> Tensor:
    h = (p / "depthwise").conv(x, padding=3, groups=x.shape[1])
    if time is not None:
        h = h + (p / "time" / "1").linear(gelu(time))[:, :, None, None]
    h = (p / "net" / "1").conv((p / "net" / "0").norm(h), padding=1)
    h = (p / "net" / "4").conv((p / "net" / "3").norm(gelu(h)), padding=1)
    return h + ((p / "residual").conv(x) if "residual" in p else x)


def heads_of(p: Weights, x: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys and values, (n, heads, head width, pixels)."""
    qkv = (p / "qkv").conv((p / "norm").norm(x))
    return [part.reshape(len(x), heads, -1, x[0, 0].numel()) for part in qkv.chunk(3, dim=1)]


def full_attention(p: Weights, x: Tensor, heads: int) -> Tensor:
    q, k, v = heads_of(p, x, heads)
    attention = torch.einsum("nhdi,nhdj->nhij", q * q.shape[2] ** -0.5, k).softmax(dim=3)
    out = torch.einsum("nhij,nhdj->nhdi", attention, v)
    return x + (p / "out").conv(out.reshape(len(x), -1, *x.shape[2:]))


def linear_attention(p: Weights, x: Tensor, heads: int) -> Tensor:
    q, k, v = heads_of(p, x, heads)
    q = q.softmax(dim=2) * q.shape[2] ** -0.5  # over head features
    k = k.softmax(dim=3)  # over pixels
    out = torch.einsum("nhde,nhdi->nhei", torch.einsum("nhdj,nhej->nhde", k, v), q)
    out = (p / "out" / "0").conv(out.reshape(len(x), -1, *x.shape[2:]))
    return x + (p / "out" / "1").norm(out)


def reference_unet(
    state: Mapping[str, Tensor], x: Tensor, t: Tensor, *, dim: int, stages: int, heads: int
) -> Tensor:
    """The UNet of FedDiffuse (arXiv 2406.12575, section 4), written a second time."""
    p = Weights(state)
    frequencies = 10_000.0 ** -(torch.arange(dim // 2, dtype=x.dtype) / (dim // 2 - 1))
    angles = t.to(x.dtype)[:, None] * frequencies
    time = (p / "time_mlp" / "0").linear(torch.cat((angles.sin(), angles.cos()), dim=1))
    time = (p / "time_mlp" / "2").linear(gelu(time))

    x = (p / "init_conv").conv(x, padding=3)
    skips = []
    for i in range(stages):
        stage = p / "downs" / f"{i}"
        x = block(stage / "blocks" / "1", block(stage / "blocks" / "0", x, time), time)
        x = linear_attention(stage / "attention", x, heads)
        skips.append(x)
        if i < stages - 1:
            x = (stage / "resample").conv(x, stride=2, padding=1)

    x = block(p / "mid" / "block1", x, time)
    x = full_attention(p / "mid" / "attention", x, heads)
    x = block(p / "mid" / "block2", x, time)

    for i in range(stages - 1):
        stage = p / "ups" / f"{i}"
        x = torch.cat((x, skips[stages - 1 - i]), dim=1)
        x = block(stage / "blocks" / "1", block(stage / "blocks" / "0", x, time), time)
        x = linear_attention(stage / "attention", x, heads)
        x = F.conv_transpose2d(x, (stage / "resample").w, (stage / "resample").b, stride=2, padding=1)
    return (p / "head" / "out").conv(block(p / "head" / "block", x))


def scatter(unet: ConvNextUNet) -> ConvNextUNet:
    """Moves every parameter off its first value, so that no norm or bias is without effect."""
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def tiny_unet(**options: int) -> ConvNextUNet:
    arguments = {"sample_size": 8, "dim": 8, "dim_mults": (1, 2), "heads": 2, "head_width": 8, **options}
    return scatter(ConvNextUNet(**arguments))


@pytest.mark.parametrize(
    ("arguments", "t"),
    [
        ({"sample_size": 28, "in_channels": 1, "dim": 28, "dim_mults": (1, 2, 4)}, [0, 417, 999]),
        ({"sample_size": 12, "in_channels": 3, "dim": 10, "dim_mults": (1, 2, 3)}, [3, 998]),
        (
            {"sample_size": 6, "in_channels": 3, "dim": 8, "dim_mults": (1, 3), "heads": 3, "head_width": 5},
            [500, 1],
        ),
    ],
    ids=["paper", "three channels", "other heads"],
)
def test_the_forward_pass_is_the_one_that_the_paper_describes(arguments: dict, t: list[int]) -> None:
    torch.manual_seed(0)
    unet = scatter(ConvNextUNet(**arguments))
    size = arguments["sample_size"]
    x_t = torch.randn(len(t), arguments["in_channels"], size, size)

    state = {name: tensor.double() for name, tensor in unet.state_dict().items()}
    expected = reference_unet(
        state,
        x_t.double(),
        torch.tensor(t),
        dim=arguments["dim"],
        stages=len(arguments["dim_mults"]),
        heads=arguments.get("heads", 4),
    )
    with torch.no_grad():
        eps = unet(x_t, torch.tensor(t)).sample

    assert eps.dtype == torch.float32
    torch.testing.assert_close(eps.double(), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1  # the tolerance is small beside what it judges


@pytest.mark.parametrize(
    ("image_size", "channels", "counts"),
    [
        (28, 1, {"encoder": 1_280_642, "bottleneck": 999_376, "decoder": 716_297}),
        (64, 3, {"encoder": 6_339_770, "bottleneck": 5_012_224, "decoder": 3_540_483}),
    ],
)
def test_the_slices_have_the_published_number_of_parameters(
    image_size: int, channels: int, counts: dict[str, int]
) -> None:
    model, slices = configured(PAPER_YAML, image_size, channels)
    state = model.state_dict()
    assert {
        name: sum(tensor.numel() for tensor in slices.select([name], state).values()) for name in slices.names
    } == counts


@pytest.mark.parametrize(("image_size", "channels", "count"), [(28, 1, 2_996_315), (64, 3, 14_892_477)])
def test_the_unet_has_the_published_number_of_parameters(image_size: int, channels: int, count: int) -> None:
    model, _ = configured(PAPER_YAML, image_size, channels)
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == count


def test_every_tensor_of_the_unet_is_a_trained_parameter() -> None:
    unet = tiny_unet()
    assert set(unet.state_dict()) == {name for name, p in unet.named_parameters() if p.requires_grad}


def test_an_image_of_28_pixels_costs_0_560_gflop_as_published_and_less_as_computed() -> None:
    unet, x_t = ConvNextUNet(), torch.zeros(2, 1, 28, 28)
    state, t = unet.state_dict(), torch.zeros(2)
    with torch.no_grad(), FlopCounterMode(display=False) as published:
        reference_unet(state, x_t, t, dim=28, stages=3, heads=4)
    with torch.no_grad(), FlopCounterMode(display=False) as computed:
        unet(x_t, t)
    assert published.get_total_flops() / len(x_t) / 1e9 == pytest.approx(0.560, abs=0.0005)
    assert 0.5 < computed.get_total_flops() / published.get_total_flops() < 1


@pytest.mark.parametrize(
    ("size", "mults", "multiple"), [(30, (1, 2, 4), 4), (7, (1, 2), 2), (28, (1, 1, 1, 1), 8)]
)
def test_an_image_that_cannot_be_halved_is_refused_with_the_sizes_that_can(
    size: int, mults: tuple[int, ...], multiple: int
) -> None:
    with pytest.raises(ValueError, match=f"image size must be a multiple of {multiple}, got {size}"):
        ConvNextUNet(sample_size=size, dim_mults=mults)


def test_a_unet_without_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="0 stages"):
        ConvNextUNet(dim_mults=())


@pytest.mark.parametrize("dim", [2, 27])
def test_a_width_that_is_odd_or_too_small_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"unet\.dim must be an even number of at least 4, got {dim}"):
        ConvNextUNet(dim=dim)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_a_unet_of_another_precision_predicts_the_same_in_it(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    unet, x_t, t = tiny_unet(), torch.randn(2, 1, 8, 8), torch.tensor([20, 700])
    with torch.no_grad():
        expected = unet(x_t, t).sample
        eps = unet.to(dtype)(x_t.to(dtype), t).sample
    assert eps.dtype == dtype
    assert (eps.float() - expected).norm() < tolerance * expected.norm()


def test_one_time_step_for_all_images_is_the_same_step_for_each() -> None:
    torch.manual_seed(0)
    unet, x_t = tiny_unet(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        each = unet(x_t, torch.tensor([321, 321, 321])).sample
        for shared in (321, torch.tensor(321)):
            torch.testing.assert_close(unet(x_t, shared).sample, each, rtol=0, atol=0)
        assert not torch.allclose(unet(x_t, 322).sample, each, atol=1e-4)


def test_each_image_of_a_batch_has_its_own_time_step() -> None:
    torch.manual_seed(0)
    unet, x_t = tiny_unet(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        together = unet(x_t, torch.tensor([5, 500, 950])).sample
        alone = torch.cat([unet(x_t[i : i + 1], t).sample for i, t in enumerate((5, 500, 950))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_prediction_comes_as_diffusers_pipelines_expect_it() -> None:
    unet, x_t = tiny_unet(in_channels=3), torch.zeros(2, 3, 8, 8)
    with torch.no_grad():
        output, (eps,) = unet(x_t, 0), unet(x_t, 0, return_dict=False)
    assert isinstance(output, BaseOutput)
    assert output.sample.shape == eps.shape == (2, 3, 8, 8)
    assert output.sample.dtype == torch.float32


def test_a_saved_unet_comes_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet, x_t = tiny_unet(in_channels=3, dim=10), torch.randn(2, 3, 8, 8)
    unet.save_pretrained(tmp_path)
    again = ConvNextUNet.from_pretrained(tmp_path)

    state, state_again = unet.state_dict(), again.state_dict()
    assert list(state) == list(state_again)
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    with torch.no_grad():
        assert torch.equal(unet(x_t, 7).sample, again.eval()(x_t, 7).sample)


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]
)
def test_diffusers_pipelines_generate_from_a_saved_unet(
    pipeline: type, scheduler: type, tmp_path: Path
) -> None:
    tiny_unet(in_channels=3).save_pretrained(tmp_path)
    pipe = pipeline(unet=ConvNextUNet.from_pretrained(tmp_path), scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0
