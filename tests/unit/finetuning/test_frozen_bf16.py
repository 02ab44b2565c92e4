"""Frozen weights in bf16: the same bits are trained, and fp32 weights return."""

from functools import partial
from typing import Any

import pytest
import torch
from composed import config
from diffusers import DDPMScheduler
from lightning import Trainer
from pretrained import tiny_unet
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader

from fedlight.diffusion.ddpm import DDPM
from fedlight.finetuning.adapters import add_adapters
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.finetuning.frozen_bf16 import FrozenInBf16, is_exact
from fedlight.runtime.errors import Diverged

SLICES = config("finetuning=lora").model.slices


def adapted() -> DDPM:
    unet = tiny_unet("UNet2DModel", classes=4)
    tuning = FinetuningConfig(
        name="lora", pretrained=None, sha256=None, rank=2, targets=["attention", "convolutions"]
    )
    frozen = add_adapters(unet, tuning, seed=0)
    schedule = DDPMScheduler(num_train_timesteps=20)
    optimizer = partial(Adam, lr=1e-2)
    return DDPM(unet, schedule, "mse", optimizer, SLICES, label_dropout=0.1, frozen=frozen)


def fit(module: DDPM, *callbacks: Any) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = DataLoader(list(zip(images, torch.arange(8) % 3, strict=True)), batch_size=4)
    Trainer(
        accelerator="cpu", max_epochs=2, precision="bf16-mixed", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    ).fit(module, data)  # fmt: skip


def frozen_of(module: DDPM) -> dict[str, Tensor]:
    return {name: p.data for name, p in module.named_parameters() if name in module.frozen}


class Seen(FrozenInBf16):
    """Notes the dtype of each parameter during the fit."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.dtypes = {name: parameter.dtype for name, parameter in pl_module.named_parameters()}


def test_training_has_the_same_bits_and_fp32_weights_return() -> None:
    full, half, seen = adapted(), adapted(), Seen()
    before = {name: tensor.clone() for name, tensor in frozen_of(half).items()}
    fit(full)
    fit(half, seen)
    trained = half.state_dict()
    assert any(tensor.any() for name, tensor in trained.items() if ".lora_B." in name)
    for name, tensor in full.state_dict().items():
        assert torch.equal(trained[name], tensor), name
    for name, tensor in frozen_of(half).items():
        assert torch.equal(tensor, before[name]), name

    rounded = {name for name, dtype in seen.dtypes.items() if dtype is torch.bfloat16}
    sizes = {name: tensor.numel() for name, tensor in before.items()}
    assert sum(sizes[name] for name in rounded) > 0.9 * sum(sizes.values())
    assert all(name in half.frozen for name in rounded)
    assert seen.dtypes["unet.conv_in.base_layer.weight"] is torch.float32
    assert not any("norm" in name or "class_embedding" in name for name in rounded)
    fit(full)
    fit(half, seen)
    assert all(torch.equal(half.state_dict()[name], t) for name, t in full.state_dict().items())


def test_fp32_weights_return_after_an_error() -> None:
    class Failing(FrozenInBf16):
        def on_train_batch_end(self, *_: Any) -> None:
            raise Diverged("the loss is not finite")

    module = adapted()
    before = {name: tensor.clone() for name, tensor in frozen_of(module).items()}
    with pytest.raises(Diverged):
        fit(module, Failing())
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen_of(module).items())


def test_it_is_exact_in_mixed_precision_and_of_diffusers_unets() -> None:
    unet = tiny_unet("UNet2DModel")
    assert is_exact(unet, True, "bf16-mixed")
    assert not is_exact(unet, False, "bf16-mixed")
    assert not is_exact(unet, True, "32-true")
    assert not is_exact(unet, True, "16-mixed")
    assert not is_exact(tiny_unet(), True, "bf16-mixed")
    assert not is_exact(nn.Linear(1, 1), True, "bf16-mixed")
