"""Federations in latent space and conditioned on text: trained, stopped, scored, exported, read by diffusers alone."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cell
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, LDMPipeline, StableDiffusionPipeline
from pipelines import save_latent_pipeline, save_text_pipeline

from fedlight.experiment.finished import open_cell
from fedlight.export import export

MakeCell = Callable[..., Cell]
SHORT = ["rounds=2", "clients=2", "data.limit=24", "data.batch_size=8", "optimizer.lr=0.01"]
SHORT += ["evaluation.sampler=ddim", "evaluation.steps=4", "transport=inline"]
TEXT = ["model.conditional=true", "evaluation.guidance=3"]
TOLERANCE = 1e-4 * 255


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pretrained")
    return {
        "vq": save_latent_pipeline(root / "vq"),
        "kl": save_latent_pipeline(root / "kl", "kl", channels=3),
        "text": save_text_pipeline(root / "text"),
    }


def drawn_by_diffusers(pipeline: Any, images: int, seed: int, **arguments: Any) -> np.ndarray:
    """Images by diffusers alone, in 0..255, shape (n, channels, height, width)."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    arguments |= {"generator": generator, "num_inference_steps": 4, "output_type": "np"}
    if isinstance(pipeline, LDMPipeline):
        arguments["batch_size"] = images
    return 255 * pipeline(**arguments).images.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_federation_in_latent_space_is_drawn_alike_by_diffusers(
    kind: str, folders: dict[str, Path], cell: MakeCell
) -> None:
    made = cell(*SHORT, "finetuning=full", f"finetuning.pretrained={folders[kind]}", "evaluation.grid=4")
    pretrained = DiffusionPipeline.from_pretrained(folders[kind])
    alone = DiffusionPipeline.from_pretrained(made.folder / "model")
    assert isinstance(alone, LDMPipeline)
    images = open_cell(made.folder).sample(images=5, seed=3).numpy()
    assert images.shape == (5, 1, 8, 8)
    assert np.abs(drawn_by_diffusers(alone, 5, 3).mean(1, keepdims=True) - images).max() <= 0.5 + TOLERANCE
    assert np.abs(drawn_by_diffusers(pretrained, 5, 3).mean(1, keepdims=True) - images).max() > 5
    for name, tensor in pretrained.vqvae.state_dict().items():
        assert torch.equal(alone.vqvae.state_dict()[name], tensor)
