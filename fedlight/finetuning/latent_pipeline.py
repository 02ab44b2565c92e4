"""A complete pipeline of diffusers around a fine-tuned UNet that denoises latents."""

from diffusers import DDPMScheduler, DiffusionPipeline
from torch import nn

from fedlight.finetuning.latents import LatentSpace
from fedlight.finetuning.pretrained import PretrainedPipeline
from fedlight.finetuning.prompts import load_text_encoder


def complete_pipeline(
    pretrained: PretrainedPipeline, unet: nn.Module, schedule: DDPMScheduler, latents: LatentSpace
) -> DiffusionPipeline:
    """A `StableDiffusionPipeline`, or an `LDMPipeline` where the UNet is not conditioned on text.

    The checker of Stable Diffusion's images is left out.

    Args:
        pretrained: the pipeline that the UNet was fine-tuned from; its text encoder is loaded.
        unet: without adapters.
        schedule: of training.
        latents: its autoencoder.

    Raises:
        BadInput: the text encoder cannot be loaded.
    """
    if not pretrained.has_text:
        from diffusers import LDMPipeline

        return LDMPipeline(latents.autoencoder, unet, schedule)
    tokenizer, text_encoder = load_text_encoder(pretrained.folder)
    from diffusers import StableDiffusionPipeline  # which needs transformers, and seconds to import

    return StableDiffusionPipeline(
        latents.autoencoder,
        text_encoder,
        tokenizer,
        unet,
        schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
