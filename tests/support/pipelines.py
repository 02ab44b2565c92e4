"""Tiny pipelines of diffusers with random weights, as users have them on disk: pixels, latents, text."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "photo", "of", "the", *(str(digit) for digit in range(10)))
TOKENS = 8  # of a prompt
WIDTH = 8  # of an embedding
LEVELS: dict[str, Any] = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
ATTENTION: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}


def save_pixel_pipeline(folder: Path, channels: int = 1, **options: Any) -> Path:
    """A `DDPMPipeline`: UNet2DModel on images of 8 x 8."""
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, **LEVELS, **ATTENTION, **options
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


def make_vae(kind: str = "kl", channels: int = 1) -> AutoencoderKL | VQModel:
    """An autoencoder that halves images once, to two latent channels; `kl` or `vq`."""
    torch.manual_seed(2)
    shared: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        **LEVELS,
    }
    if kind == "vq":
        return VQModel(num_vq_embeddings=16, scaling_factor=0.5, **shared)
    return AutoencoderKL(scaling_factor=0.5, sample_size=8, **shared)


def save_latent_pipeline(folder: Path, kind: str = "vq", channels: int = 1, **options: Any) -> Path:
    """A `LDMPipeline`: UNet2DModel on latents of 4 x 4, made of images of 8 x 8."""
    vae = make_vae(kind, channels)
    torch.manual_seed(3)
    unet = UNet2DModel(sample_size=4, in_channels=2, out_channels=2, **LEVELS, **ATTENTION, **options)
    LDMPipeline(vae, unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """The files of a CLIPTokenizer whose vocabulary is WORDS and the letters that these are made of."""
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = " ".join(parts[:2])
            parts[:2] = ["".join(parts[:2])]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(parts[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    numbered = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}), encoding="utf-8"
    )
    return folder


def save_text_pipeline(folder: Path, channels: int = 3, prediction_type: str = "epsilon") -> Path:
    """A `StableDiffusionPipeline`: UNet2DConditionModel on latents of 4 x 4, made of images of 8 x 8."""
    save_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(4)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        **LEVELS,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        make_vae("kl", channels),
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
