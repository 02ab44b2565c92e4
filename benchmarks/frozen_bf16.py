"""A step of adapters with frozen weights in fp32 and in bf16: its peak memory, loss and gradients.

python benchmarks/frozen_bf16.py [--images FOLDER]

A UNet2DConditionModel of random weights takes steps on two latents of 16 x 16. Each peak is that of a process
of its own, on the CPU; the fp32 copies, which a cell keeps to draw images, are dropped, as if they were in
other memory than that of a GPU.

FOLDER is a pipeline of images: how far images that are drawn in fp32 move if its weights are rounded to bf16.
"""

import argparse
import json
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.optim import Adam

from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.sampling import sample
from fedlight.finetuning.adapters import add_adapters
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.finetuning.frozen_bf16 import FrozenInBf16
from fedlight.finetuning.pretrained import open_pretrained
from fedlight.finetuning.prompts import condition_on_prompts
from fedlight.runtime.peak_memory import PeakMemory

HALF = torch.bfloat16
SIZE = 28  # of images, of Fashion-MNIST


def make_module() -> DDPM:
    """A model with adapters of rank 4 whose factors B are not zero."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(128, 256, 256, 256),
        cross_attention_dim=256,
        attention_head_dim=8,
        layers_per_block=1,
    )
    config = FinetuningConfig(name="lora", pretrained=None, sha256=None, rank=4)
    frozen = add_adapters(unet.train(), config, 0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    condition_on_prompts(unet, torch.randn(2, 8, 256))
    slices = {"all": [name for name, _ in unet.named_children()]}
    return DDPM(
        unet, DDPMScheduler(), "mse", partial(Adam, lr=1e-4), slices, label_dropout=0.0, frozen=frozen
    )


def take_step(module: DDPM, mixed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step and the gradients of the adapters."""
    module.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x_0, eps = torch.randn(2, 2, 4, 16, 16, generator=generator).unbind()
    drawn = {"x_0": x_0, "eps": eps, "t": torch.tensor([10, 500]), "class_labels": torch.tensor([0, 1])}
    with torch.autocast("cpu", HALF) if mixed else nullcontext():
        loss = module.loss_of(drawn)
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def print_peak(weights: str) -> None:
    """Prints the peak memory of this process in MB during two steps in mixed precision."""
    module = make_module()
    if weights == "bf16":
        FrozenInBf16().begin(module)
    peak = PeakMemory()
    for _ in range(2):
        take_step(module, True)
    print(json.dumps(peak.megabytes))


def describe_difference(one: Any, other: Any) -> str:
    """Of two results of `take_step`."""
    losses, gradients = (one[0], other[0]), (one[1], other[1])
    if torch.equal(*losses) and all(torch.equal(gradients[0][name], g) for name, g in gradients[1].items()):
        return "loss and gradients are equal bit for bit"
    change = sum(float((gradients[0][name] - g).square().sum()) for name, g in gradients[1].items())
    norm = sum(float(g.square().sum()) for g in gradients[0].values())
    loss = abs(float(losses[1] / losses[0]) - 1)
    return f"the loss differs by {loss:.3%}, the gradients by {(change / norm) ** 0.5:.2%} (L2)"


def compare_images(folder: str) -> None:
    """Prints how far 32 images of a pipeline move if the weights of its layers are rounded to bf16."""
    config = FinetuningConfig(name="full", pretrained=folder, sha256=None)
    pipeline = open_pretrained(config, str(Path.home() / ".cache" / "fedlight"))
    unet, schedule = pipeline.load_model("unet"), pipeline.load_schedule()
    rounded = deepcopy(unet)
    for layer in rounded.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(HALF).float()
    shape = (32, unet.config.in_channels, SIZE, SIZE)
    drawn = [
        sample(one, schedule, shape, sampler="ddim", steps=20, seed=1).float() for one in (unet, rounded)
    ]
    change = (drawn[0] - drawn[1]).abs()
    print(f"32-true, rounded to fp32: images differ by {change.mean():.1f} of 255, up to {change.max():.0f}")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", metavar="FOLDER")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print_peak(given.peak)
        return
    if given.images:
        compare_images(given.images)
        return
    print(f"{sum(p.numel() for p in make_module().unet.parameters()) / 1e6:.1f} million parameters")
    for weights in ("fp32", "bf16"):
        command = [sys.executable, __file__, "--peak", weights]
        done = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
        print(f"bf16-mixed, frozen weights in {weights}: peak of the process {float(done.stdout):,.0f} MB")
    full, half, rounded = make_module(), make_module(), make_module()
    FrozenInBf16().begin(half)
    FrozenInBf16().begin(rounded)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.float()
    print("bf16-mixed, bf16 to fp32:", describe_difference(take_step(full, True), take_step(half, True)))
    print("32-true, rounded to fp32:", describe_difference(take_step(full, False), take_step(rounded, False)))


if __name__ == "__main__":
    main()
