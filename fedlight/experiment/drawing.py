"""Images are drawn from a model of a cell, as the cell's `evaluation` section says."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.sampling import sample, sample_together
from fedlight.federation.messages import State
from fedlight.finetuning.latents import LatentSpace
from fedlight.loggers import pictures


def grid_images(config: CellConfig) -> int:
    """The number of images of one model in the sample grid."""
    grid = config.evaluation.grid
    return min(grid, pictures.COLUMNS) if config.method.evaluate == "clients" else grid


def images_per_model(config: CellConfig) -> int:
    """The number of images to draw from one model: enough for the scores and for the sample grid."""
    return max(config.evaluation.samples, grid_images(config))


def names_of_denoiser(module: DDPM, state: State) -> str:
    """The prefix of the names of the UNet to sample from: its moving average where it has begun."""
    averaged = module.ema is not None and state["ema.n_averaged"] > 0
    return "ema.module." if averaged else "unet."


def cycle_labels(config: CellConfig, images: int, classes: int) -> Tensor | None:
    """The labels 0, 1, ..., classes - 1, 0, 1, ... for images of a conditional model, int64, shape (images,).

    None for an unconditional model.
    """
    return torch.arange(images) % classes if config.model.conditional else None


def draw_images(
    module: DDPM,
    device: torch.device,
    state: State,
    config: CellConfig,
    images: int,
    seed: int,
    labels: Tensor | None,
    model: str,
    workers: int = 1,
    on_step: Callable[[], None] = lambda: None,
    on_frame: Callable[[Tensor], None] | None = None,
    latents: LatentSpace | None = None,
) -> Tensor:
    """Draws images from the model with the given state_dict, by the cell's sampler.

    Args:
        module: the model; its weights are replaced by `state`, and it is left on the CPU.
        device: to draw on.
        state: the state_dict.
        config: of the cell.
        images: the number of images.
        seed: decides the images.
        labels: the labels that a conditional model is conditioned on, int64, shape (images,); None for an
            unconditional one.
        model: names the model in error messages.
        workers: threads that denoise one batch each; the images do not depend on it.
        on_step: called after every denoising step.
        on_frame: receives the images after every denoising step.
        latents: where the model denoises; None for images.

    Returns:
        The images, uint8 in 0..255, shape (images, channels, height, width), on the CPU.

    Raises:
        Diverged: the images are not finite.
    """
    module.to(device).load_state_dict(state)
    drawn = sample(
        module.denoiser,
        module.schedule,
        **_sampling(config, images, latents),
        seed=seed,
        labels=labels,
        workers=workers,
        on_step=on_step,
        on_frame=on_frame,
        model=model,
    )
    module.cpu()
    return drawn


def draw_images_together(
    module: DDPM,
    device: torch.device,
    states: Sequence[State],
    config: CellConfig,
    images: int,
    seeds: Sequence[int],
    labels: Tensor | None,
    models: Sequence[str],
    on_step: Callable[[], None] = lambda: None,
    latents: LatentSpace | None = None,
) -> list[Tensor]:
    """Draws images from several models in one computation; each differs by rounding from what it draws alone.

    Args:
        module: the kind of model, of whose weights only frozen ones are used; it is left on the CPU.
        states: the state_dict of each model.
        seeds: decide the images of each model.
        models: names of the models in error messages.
        device, config, images, labels, on_step, latents: as for `draw_images`; `images` is the number for
            each model.

    Returns:
        For each model its images, as `draw_images` returns them.

    Raises:
        Diverged: the images of a model are not finite.
    """
    module.to(device)
    weights = []
    for state in states:
        prefix = names_of_denoiser(module, state)
        trained = [name for name, _ in module.unet.named_parameters() if f"{prefix}{name}" in state]
        weights.append({name: state[f"{prefix}{name}"] for name in trained})
    drawn = sample_together(
        module.unet,
        weights,
        module.schedule,
        **_sampling(config, images, latents),
        seeds=seeds,
        labels=labels,
        on_step=on_step,
        models=models,
    )
    module.cpu()
    return drawn


def _sampling(config: CellConfig, images: int, latents: LatentSpace | None) -> dict[str, Any]:
    """The arguments of `sample` and `sample_together` that a cell decides."""
    evaluation = config.evaluation
    return {
        "shape": (images, *(latents.shape if latents else config.data.shape)),
        "sampler": evaluation.sampler,
        "steps": evaluation.steps,
        "guidance": evaluation.guidance,
        "decode": latents.decode if latents else None,
    }
