"""Tiny pretrained pipelines with random weights, for tests of fine-tuning."""

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, ModelMixin, UNet2DModel

from fedlight.diffusion.unet import ConvNextUNet


def tiny_unet(kind: str = "ConvNextUNet", classes: int | None = None) -> ModelMixin:
    """A UNet for grey 8x8 images; every parameter is random, also those that layers set to 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = _make_unet(kind, classes)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return unet


def _make_unet(kind: str, classes: int | None) -> ModelMixin:
    if kind == "ConvNextUNet":
        return ConvNextUNet(8, 1, 8, (1, 2), 1, 2, 4, classes)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    )


def save_pretrained(folder: Path, kind: str = "ConvNextUNet", classes: int | None = None) -> Path:
    """Saves a pipeline with such a UNet; returns its folder."""
    schedule = DDPMScheduler(
        num_train_timesteps=20, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    DDPMPipeline(tiny_unet(kind, classes), schedule).save_pretrained(folder)
    return folder
