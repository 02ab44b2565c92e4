"""What a fine-tuned cell starts from: the pretrained UNet, prepared for what is trained of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DDPMScheduler

from fedlight.diffusion.model import Backbone
from fedlight.finetuning.adapters import add_adapters
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.finetuning.latents import LatentSpace, load_latent_space
from fedlight.finetuning.pretrained import PretrainedPipeline, open_pretrained
from fedlight.finetuning.prompts import condition_on_prompts, embed_cached, make_prompts
from fedlight.runtime.errors import BadInput
from fedlight.runtime.seeds import derive_seed

LORA = "lora"
LEAST_SIGNAL = 1e-6
"""Smallest alpha_bar at which predicted noise determines unclipped latents, divided by its root."""


@dataclass(frozen=True)
class PretrainedStart:
    """What a fine-tuned cell starts from.

    Attributes:
        pipeline: the pretrained pipeline.
        backbone: its UNet, with adapters where these are trained, and its noise schedule.
        latents: where the UNet denoises; None for images.
    """

    pipeline: PretrainedPipeline
    backbone: Backbone
    latents: LatentSpace | None


def make_start(
    config: FinetuningConfig, seed: int, cache: str, classes: Sequence[str], image_shape: tuple[int, int, int]
) -> PretrainedStart:
    """The pretrained UNet and its schedule; with `finetuning=lora` the UNet has adapters, which are trained.

    Args:
        config: the section `finetuning`.
        seed: of the cell, which decides the first values of adapters.
        cache: fedlight's cache folder.
        classes: the class names of the data; a UNet that is conditioned on text has a prompt for each.
        image_shape: channels, height and width of the images of the data.

    Raises:
        BadInput: the pipeline cannot be loaded, it does not fit the data, or a target of the adapters is
            unknown.
    """
    pipeline = open_pretrained(config, cache)
    latents = load_latent_space(pipeline, image_shape)
    unet, schedule = pipeline.load_model("unet"), pipeline.load_schedule()
    if latents:
        schedule = make_latent_schedule(schedule)
    unet.requires_grad_(True).train()
    frozen: frozenset[str] = frozenset()
    if config.name == LORA:
        frozen = add_adapters(unet, config, derive_seed(seed, "adapters"))
    if pipeline.has_text:
        prompts = make_prompts(config.prompt, classes)
        condition_on_prompts(unet, embed_cached(pipeline.folder, pipeline.sha256, prompts, cache))
    elif config.prompt is not None:
        raise BadInput(
            f"finetuning.prompt needs a pipeline that is conditioned on text, with a text encoder, and "
            f"{pipeline.folder} has {', '.join(pipeline.classes)}"
        )
    return PretrainedStart(pipeline, Backbone(unet, schedule, frozen), latents)


def make_latent_schedule(schedule: DDPMScheduler) -> DDPMScheduler:
    """The schedule of a pipeline that denoises latents, which are clipped where its range is above 1.

    A range of 1 is that of images, and the default of diffusers: it would cut latents off.

    Raises:
        BadInput: nothing is clipped, and an error of the noise predicted in the first denoising step would be
            thousands of times as large in the latents.
    """
    clipped = schedule.config.clip_sample and schedule.config.clip_sample_range > 1
    least = float(schedule.alphas_cumprod.min())
    if schedule.config.prediction_type == "epsilon" and least < LEAST_SIGNAL and not clipped:
        raise BadInput(
            f"finetuning.pretrained predicts noise, and its noise schedule ({schedule.config.beta_schedule}) "
            f"leaves alpha_bar = {least:.1g} of the signal, so that latents diverge: set clip_sample to true "
            "and clip_sample_range to the largest value of a latent (about 4) in "
            "scheduler/scheduler_config.json, or use another schedule, such as scaled_linear"
        )
    return DDPMScheduler.from_config(schedule.config, clip_sample=clipped)
