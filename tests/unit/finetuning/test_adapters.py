"""Adapters: what is trained and stored, their gradients, merging, aggregation, diffusers' format."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import config
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from pretrained import tiny_unet
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam

from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.depthwise import use_plain_layers
from fedlight.diffusion.sampling import sample
from fedlight.federation.aggregate import WeightedMean
from fedlight.federation.slices import SliceMap, buffer_names
from fedlight.finetuning.adapters import (
    ADAPTER_FILE,
    add_adapters,
    find_targets,
    merge_adapters,
    save_adapter,
)
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.privacy.example_level import TrainingStep, per_sample_gradients
from fedlight.runtime.errors import BadInput

SCHEDULE = DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
SLICES = config("finetuning=lora").model.slices
KINDS = ("ConvNextUNet", "UNet2DModel")
EVERYWHERE = ["attention", "convolutions"]


def section(**keys: Any) -> FinetuningConfig:
    return FinetuningConfig(**{"name": "lora", "pretrained": None, "sha256": None, **keys})


def adapted(kind: str, seed: int = 0, scale: float = 0.3, **keys: Any) -> DDPM:
    """A model whose adapters are as after training: the factors B, first zero, are random."""
    unet = tiny_unet(kind)
    frozen = add_adapters(unet, section(**keys), seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name not in frozen and (".lora_B." in name or seed):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return DDPM(unet, SCHEDULE, "mse", partial(Adam, lr=1e-3), SLICES, frozen=frozen)


def factors(module: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The factors A and B of each adapted layer, and their scale."""
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def product(first: Tensor, second: Tensor) -> Tensor:
    """B A, of a linear layer, or of a convolution, whose B is one of 1x1."""
    return torch.einsum("or,ri...->oi...", second.flatten(1), first)


def drawn(images: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_0, eps = torch.randn(2, images, 1, 8, 8, generator=generator).unbind()
    return {"x_0": x_0, "t": torch.arange(images) + 2, "eps": eps}


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_stored_and_trained_and_each_slice_has_some(kind: str) -> None:
    module = adapted(kind, targets=EVERYWHERE)
    state = module.state_dict()
    assert state
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    optimizer = module.configure_optimizers()
    (group,) = optimizer.param_groups
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {named[id(parameter)] for parameter in group["params"]} == state.keys()
    assert not buffer_names(module)
    slices = SliceMap.build(module.slices, state, module.private)
    assert {name for names in slices.names.values() for name in names} == state.keys()
    decoder = {name.split(".")[1] for name in slices.names["decoder"]}
    assert decoder <= {"ups", "head", "up_blocks", "conv_out"}


@pytest.mark.parametrize(("kind", "model"), [*zip(KINDS, ("tiny", "unet2d"), strict=True)])
def test_the_slices_of_a_pretrained_model_are_those_of_its_kind(kind: str, model: str) -> None:
    names = tiny_unet(kind).state_dict()
    ours, theirs = (
        SliceMap.build(prefixes, names) for prefixes in (SLICES, config(f"model={model}").model.slices)
    )
    assert ours == theirs


def test_loading_replaces_adapters_and_leaves_what_is_frozen() -> None:
    module, other = adapted("ConvNextUNet"), adapted("ConvNextUNet", seed=5)
    base = {name: p.clone() for name, p in module.named_parameters() if name not in module.state_dict()}
    module.load_state_dict(other.state_dict(), strict=True)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in module.state_dict().items())
    parameters = dict(module.named_parameters())
    assert base
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in base.items())
    first = next(iter(module.state_dict()))
    incomplete = {name: tensor for name, tensor in other.state_dict().items() if name != first}
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(incomplete, strict=True)


def test_a_moving_average_stores_its_adapters_alone() -> None:
    unet = tiny_unet()
    frozen = add_adapters(unet, section(), seed=0)
    module = DDPM(unet, SCHEDULE, "mse", partial(Adam, lr=1e-3), SLICES, ema_decay=0.9, frozen=frozen)
    averaged = [name for name in module.state_dict() if name.startswith("ema.module.")]
    assert averaged
    assert all(".lora_" in name for name in averaged)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_adapters_are_those_of_a_plain_model_and_none_is_zero(kind: str) -> None:
    """The plain model is the pretrained one with W + s B A for each weight."""
    module, plain = adapted(kind, targets=EVERYWHERE, rank=2, alpha=3.0), tiny_unet(kind)
    pairs = factors(module.unet)
    assert pairs.keys() == set(find_targets(plain, EVERYWHERE))
    loss = module.loss_of(drawn())
    loss.backward()

    copies = {name: (a.detach().clone(), b.detach().clone(), s) for name, (a, b, s) in pairs.items()}
    weights = dict(plain.named_parameters())
    for name, (first, second, scale) in copies.items():
        first.requires_grad_(), second.requires_grad_()
        weights[f"{name}.weight"] = weights[f"{name}.weight"].detach() + scale * product(first, second)
    batch = drawn()
    x_t = SCHEDULE.add_noise(batch["x_0"], batch["eps"], batch["t"])
    predicted = functional_call(plain, weights, (x_t, batch["t"])).sample
    expected = (predicted - batch["eps"]).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, (first, second, scale) in pairs.items():
        assert scale == 1.5
        for factor, copy in zip((first, second), copies[name], strict=False):
            assert factor.grad is not None
            assert factor.grad.abs().max() > 0, name
            torch.testing.assert_close(factor.grad, copy.grad, rtol=1e-3, atol=1e-6)


class InDouble(nn.Module):
    """A UNet that computes in float64: models of random weights multiply rounding from step to step."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = deepcopy(unet).double()

    def forward(self, x_t: Tensor, t: Tensor) -> Any:
        return SimpleNamespace(sample=self.unet(x_t.double(), t).sample.float())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_draws_the_adapted_models_images(kind: str) -> None:
    module = adapted(kind, targets=EVERYWHERE)
    merged = merge_adapters(module.unet)
    assert merged.state_dict().keys() == tiny_unet(kind).state_dict().keys()
    x_t, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(7)
    with torch.no_grad():
        predictions = [unet(x_t, t).sample for unet in (module.unet, merged, tiny_unet(kind))]
    torch.testing.assert_close(predictions[0], predictions[1], rtol=0, atol=1e-5)
    assert (predictions[0] - predictions[2]).abs().max() > 0.01
    images: list[Tensor] = []  # as floats, before they are rounded to bytes

    def keep(drawn: Tensor) -> Tensor:
        images.append(drawn)
        return drawn

    for unet in (module.unet, merged, tiny_unet(kind)):
        sample(InDouble(unet), SCHEDULE, (4, 1, 8, 8), sampler="ddim", steps=5, seed=4, decode=keep)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    assert (images[0] - images[2]).abs().max() > 0.01


def aggregate(train: str) -> float:
    """The largest difference of the merged mean of three clients to the mean of their merged weights.

    It is relative to the largest change of a weight.
    """
    clients = [adapted("ConvNextUNet", seed, train=train, targets=EVERYWHERE) for seed in (1, 2, 3)]
    weights = (10, 20, 30)
    mean, merged_mean = WeightedMean(), WeightedMean()
    for module, weight in zip(clients, weights, strict=True):
        mean.add({name: tensor.double() for name, tensor in module.state_dict().items()}, weight)
        merged_mean.add({n: t.double() for n, t in merge_adapters(module.unet).state_dict().items()}, weight)
    server = adapted("ConvNextUNet", train=train, targets=EVERYWHERE)
    server.double().load_state_dict(mean.result())
    merged, expected = merge_adapters(server.unet).state_dict(), merged_mean.result()
    first = tiny_unet().double().state_dict()
    change = max(float((expected[name] - first[name]).abs().max()) for name in first)
    return max(float((merged[name] - expected[name]).abs().max()) for name in first) / change


def test_the_mean_of_b_alone_is_exact_and_that_of_both_factors_is_not() -> None:
    assert aggregate("b") < 1e-6
    assert aggregate("both") > 0.05


def test_with_b_alone_a_is_of_the_seed_and_is_not_stored() -> None:
    module = adapted("ConvNextUNet", train="b")
    assert all(".lora_B." in name for name in module.state_dict())
    unets = [tiny_unet() for _ in range(3)]
    for unet, seed in zip(unets, (7, 7, 8), strict=True):
        before = torch.get_rng_state()
        add_adapters(unet, section(train="b"), seed)
        assert torch.equal(before, torch.get_rng_state())
    one, same, other = (next(iter(factors(unet).values()))[0] for unet in unets)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_single_images_are_those_of_a_loop(kind: str) -> None:
    class FixedDraws(TrainingStep):
        def forward(self, batch: Any) -> Tensor:
            names = ("x_0", "t", "eps")
            return self.module.loss_of(dict(zip(names, batch, strict=True)))

    module = adapted(kind, targets=EVERYWHERE)
    use_plain_layers(module)
    named = {name: p for name, p in module.named_parameters() if name in module.state_dict()}
    batch = tuple(drawn(3).values())
    gradients, losses = per_sample_gradients(FixedDraws(module), named, batch)
    for image in range(3):
        module.zero_grad()
        loss = module.loss_of({name: tensor[image : image + 1] for name, tensor in drawn(3).items()})
        loss.backward()
        torch.testing.assert_close(losses[image], loss.detach())
        for name, parameter in named.items():
            torch.testing.assert_close(gradients[name][image], parameter.grad, rtol=1e-3, atol=1e-6)


def test_diffusers_loads_a_saved_adapter_of_any_scale(tmp_path: Path) -> None:
    def condition_unet() -> UNet2DConditionModel:
        torch.manual_seed(2)
        return UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            block_out_channels=(8, 16),
            cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    ours, theirs = condition_unet(), condition_unet()
    add_adapters(ours, section(rank=2, alpha=6.0), seed=0)
    with torch.no_grad():
        for _, second, _ in factors(ours).values():
            second.normal_(std=0.3)
    save_adapter(tmp_path, ours)
    theirs.load_lora_adapter(load_file(tmp_path / ADAPTER_FILE), prefix="unet")
    x_t, words = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    with torch.no_grad():
        before = condition_unet()(x_t, 3, words).sample
        adapted_, loaded = (unet(x_t, 3, words).sample for unet in (ours, theirs))
    torch.testing.assert_close(adapted_, loaded, rtol=0, atol=1e-5)
    assert (adapted_ - before).abs().max() > 0.01


def test_targets_are_attention_convolutions_or_names() -> None:
    unet = tiny_unet()
    attention, convolutions = (find_targets(unet, [group]) for group in EVERYWHERE)
    assert "mid.attention.qkv" in attention
    assert "downs.0.attention.out.0" in attention
    assert "init_conv" in convolutions
    assert not set(attention) & set(convolutions)
    assert not any("depthwise" in name for name in (*attention, *convolutions))
    assert find_targets(unet, ["qkv"]) == [name for name in attention if name.endswith(".qkv")]
    assert find_targets(unet, ["mid.attention.out"]) == ["mid.attention.out"]
    with pytest.raises(BadInput, match="no layer to_w; can be attention, convolutions, or a name such as"):
        find_targets(unet, ["attention", "to_w"])


def test_a_rank_above_that_of_every_weight_is_an_error_of_one_line() -> None:
    unet = tiny_unet()
    shapes = [unet.get_submodule(name).weight.flatten(1).shape for name in find_targets(unet, ["attention"])]
    largest = max(min(shape) for shape in shapes)
    add_adapters(tiny_unet(), section(rank=largest), seed=0)
    message = rf"^finetuning\.rank={largest + 1}: .* ranks up to {largest}; [^\n]*$"
    with pytest.raises(BadInput, match=message):
        add_adapters(unet, section(rank=largest + 1), seed=0)


def test_a_model_whose_statistics_run_has_no_adapters() -> None:
    unet: Any = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    with pytest.raises(BadInput, match=r"1\.running_mean changes while it trains"):
        add_adapters(unet, section(targets=["convolutions"]), seed=0)
