"""Draws images from a trained UNet, by diffusers' schedulers."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from threading import Lock
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlight.diffusion.prediction import VELOCITY, noise_between, to_image
from fedlight.runtime.errors import BadInput, Diverged
from fedlight.runtime.pixels import to_bytes
from fedlight.runtime.vmap import vmap

SAMPLERS: dict[str, Callable[..., Any]] = {
    "ddpm": DDPMScheduler.from_config,  # arXiv 2006.11239
    "ddim": DDIMScheduler.from_config,  # arXiv 2010.02502
    "dpm-solver++": DPMSolverMultistepScheduler.from_config,  # arXiv 2211.01095
    "sde-dpm-solver++": partial(  # with fresh noise in each step
        DPMSolverMultistepScheduler.from_config, algorithm_type="sde-dpmsolver++"
    ),
}
BATCH = 256  # images denoised at once
PROMPTS = "prompt_embeddings"  # the buffer of a UNet whose labels stand for prompts
LEAST_ALPHA_BAR = 1e-9
"""Below it, float32 noise determines x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar) to worse than
half a grey level."""


def sampling_steps(images: int, steps: int) -> int:
    """How often `sample` calls `on_step` for this number of images."""
    return -(-images // BATCH) * steps


def check_sampler(sampler: str, steps: int, schedule: DDPMScheduler) -> None:
    """Raises BadInput for an unknown sampler, or steps that do not divide the schedule."""
    if sampler not in SAMPLERS:
        raise BadInput(f"evaluation.sampler must be one of {', '.join(SAMPLERS)}, got {sampler}")
    if steps > schedule.config.num_train_timesteps:
        raise BadInput(
            f"evaluation.steps must be at most {schedule.config.num_train_timesteps}, the length of the "
            f"noise schedule, got {steps}"
        )
    if schedule.config.num_train_timesteps % steps:
        raise BadInput(
            f"evaluation.steps must divide {schedule.config.num_train_timesteps}, the length of the noise "
            f"schedule, so that steps are evenly spaced and end without noise, got {steps}"
        )


@torch.no_grad()
def sample(
    unet: nn.Module,
    schedule: DDPMScheduler,
    shape: tuple[int, int, int, int],
    *,
    sampler: str,
    steps: int,
    seed: int,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    batch_size: int = BATCH,
    workers: int = 1,
    on_step: Callable[[], None] = lambda: None,
    on_frame: Callable[[Tensor], None] | None = None,
    model: str = "the model",
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Draws images.

    Args:
        unet: predicts the noise or the velocity, as the schedule's `prediction_type` says; called as
            `unet(x_t, t).sample` in evaluation mode, and returned to the mode that it was in.
        schedule: the noise schedule of training.
        shape: (images, channels, height, width), of latents where there is `decode`.
        sampler: one of SAMPLERS.
        steps: number of denoising steps, a divisor of T.
        seed: of all random numbers, which are the same on every device.
        labels: class labels for a conditional UNet, int64, shape (images,); None for an unconditional one.
        guidance: scale of classifier-free guidance; 1 for none.
        batch_size: number of images denoised at once.
        workers: number of threads that denoise one batch each; the images do not depend on it.
        on_step: called after each denoising step of each batch, by one thread at a time.
        on_frame: called after each step with the batch's intermediate images, uint8, on the CPU.
        model: name of the model in error messages.
        decode: makes images in [-1, 1] of latents, which are clipped if the schedule says so; None where
            images are denoised, which are clipped to [-1, 1].

    Returns:
        The images, uint8 in 0..255, on the CPU, of the given shape, or of that which `decode` returns.

    Raises:
        BadInput: unknown sampler, or steps that do not divide the schedule.
        Diverged: a predicted value is not finite; the message names the first such step.
    """
    check_sampler(sampler, steps, schedule)
    device = next(unet.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(shape, generator=generator).split(batch_size)
    label_batches = [None] * len(noises) if labels is None else labels.to(device).split(batch_size)
    callback_lock = Lock()

    def advance(generator: torch.Generator, noise: Tensor) -> torch.Generator:
        """The generator's state after a batch; a sampler's draws do not depend on the UNet's predictions."""
        scheduler, advanced, zeros = (
            _make_scheduler(schedule, sampler, steps),
            generator.clone_state(),
            torch.zeros_like(noise),
        )
        for t in scheduler.timesteps:
            scheduler.step(zeros, t, zeros, generator=advanced)
        return advanced

    @torch.no_grad()  # which is a setting of each thread
    def denoise(noise: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        batch = _Batch(schedule, sampler, steps, noise.to(device), generator, decode)
        for t in batch.timesteps:
            batch.step(_predict_guided(unet, batch.x_t, t, labels, guidance), t)
            with callback_lock:
                on_step()
                if on_frame is not None:
                    on_frame(batch.frame())
        return batch.images(model, unet)

    training = unet.training
    unet.eval()
    if workers == 1:
        images = list(map(denoise, noises, label_batches, [generator] * len(noises)))
    else:
        generators = list(accumulate(noises[:-1], advance, initial=generator))
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        ) as pool:
            images = list(pool.map(denoise, noises, label_batches, generators))
    unet.train(training)
    return torch.cat(images)


@torch.no_grad()
def sample_together(
    unet: nn.Module,
    weights: Sequence[Mapping[str, Tensor]],
    schedule: DDPMScheduler,
    shape: tuple[int, int, int, int],
    *,
    sampler: str,
    steps: int,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    guidance: float = 1.0,
    batch_size: int = BATCH,
    on_step: Callable[[], None] = lambda: None,
    models: Sequence[str],
    decode: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Draws images from several models of one kind, whose predictions are one computation by `vmap`.

    Each model's random numbers are those that `sample` draws for its seed; its images differ from those of
    `sample` by rounding.

    Args:
        unet: the kind of model.
        weights: of each model, by the names of the UNet's parameters; those without a name in it, which are
            frozen, are the UNet's own.
        schedule, sampler, steps, labels, guidance, batch_size, on_step, decode: as for `sample`, of every
            model.
        shape: of the images of one model, or of its latents.
        seeds: of each model.
        models: names of the models in error messages.

    Returns:
        For each model its images, as `sample` returns them.

    Raises:
        BadInput, Diverged: as `sample`.
    """
    check_sampler(sampler, steps, schedule)
    device = next(unet.parameters()).device
    stacked = {name: torch.stack([own[name] for own in weights]).to(device) for name in weights[0]}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noises = [torch.randn(shape, generator=generator).split(batch_size) for generator in generators]
    label_batches = [None] * len(noises[0]) if labels is None else labels.to(device).split(batch_size)
    images: list[list[Tensor]] = [[] for _ in weights]
    training = unet.training
    unet.eval()
    for number, batch_labels in enumerate(label_batches):
        batches = [
            _Batch(schedule, sampler, steps, noise[number].to(device), generator, decode)
            for noise, generator in zip(noises, generators, strict=True)
        ]
        for t in batches[0].timesteps:

            def predict(
                own: dict[str, Tensor], x_t: Tensor, t: Tensor = t, labels: Any = batch_labels
            ) -> Tensor:
                return _predict_guided(_WithWeights(unet, own), x_t, t, labels, guidance)

            with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the others
                predictions = vmap(predict)(stacked, torch.stack([batch.x_t for batch in batches]))
            for batch, predicted in zip(batches, predictions, strict=True):
                batch.step(predicted, t)
                on_step()
        for drawn, batch, model in zip(images, batches, models, strict=True):
            drawn.append(batch.images(model, unet))
    unet.train(training)
    return [torch.cat(drawn) for drawn in images]


class _WithWeights:
    """A UNet that is called with other weights than its own."""

    def __init__(self, unet: Any, weights: dict[str, Tensor]) -> None:
        self.config = unet.config
        self._unet = unet
        self._weights = weights

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return functional_call(self._unet, self._weights, arguments, named)


class _Batch:
    """A batch of images on the way from noise to images.

    Args:
        schedule: the noise schedule of training.
        sampler: one of SAMPLERS.
        steps: number of denoising steps.
        noise: to begin with, on the device of the UNet.
        generator: draws the noise of the steps.
        decode: makes images in [-1, 1] of latents, which are clipped if the schedule says so; None where
            images are denoised, which are clipped to [-1, 1].

    Attributes:
        x_t: the images or latents now.
        timesteps: of the steps.
    """

    def __init__(
        self,
        schedule: DDPMScheduler,
        sampler: str,
        steps: int,
        noise: Tensor,
        generator: torch.Generator,
        decode: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._decode = decode
        self._schedule = schedule
        self._scheduler = _make_scheduler(schedule, sampler, steps)
        self._generator = generator
        self._finite: list[Tensor] = []
        latents_bound = schedule.config.clip_sample_range if schedule.config.clip_sample else math.inf
        self._bound = 1.0 if decode is None else latents_bound
        self.x_t = noise
        self.timesteps: Tensor = self._scheduler.timesteps

    def step(self, predicted: Tensor, t: Tensor) -> None:
        """Takes a step with the prediction of the UNet for `x_t` at time step t."""
        alpha_bar = self._schedule.alphas_cumprod[t]
        x_0 = to_image(predicted, self.x_t, alpha_bar, self._schedule.config.prediction_type)
        x_0 = x_0.clamp(-self._bound, self._bound)
        output = x_0 if _form(self._schedule) == "sample" else noise_between(x_0, self.x_t, alpha_bar)
        self.x_t = self._scheduler.step(output, t, self.x_t, generator=self._generator).prev_sample
        self._finite.append(predicted.isfinite().all() & self.x_t.isfinite().all())

    def images(self, model: str, unet: nn.Module) -> Tensor:
        """The images after the last step, uint8, on the CPU.

        Raises:
            Diverged: a predicted value was not finite.
        """
        if diverged := torch.stack(self._finite).logical_not().nonzero().flatten().tolist():
            first = diverged[0]
            step = f"denoising step {first + 1} of {len(self.timesteps)} (t = {int(self.timesteps[first])})"
            raise Diverged(f"{model} draws images that are not finite, from {step} on; {_advise(unet)}")
        return self.frame()

    def frame(self) -> Tensor:
        """The images now, uint8, on the CPU."""
        return to_bytes(self.x_t if self._decode is None else self._decode(self.x_t)).cpu()


def _form(schedule: DDPMScheduler) -> str:
    """What a sampler takes, `sample` or `epsilon`."""
    velocity = schedule.config.prediction_type == VELOCITY
    return "sample" if velocity and schedule.alphas_cumprod.min() < LEAST_ALPHA_BAR else "epsilon"


def _make_scheduler(schedule: DDPMScheduler, sampler: str, steps: int) -> Any:
    zero_snr = (
        {"rescale_betas_zero_snr": True} if schedule.alphas_cumprod.min() == 0 else {}
    )  # leaves the betas of such a schedule as they are
    scheduler = SAMPLERS[sampler](
        schedule.config, timestep_spacing="trailing", prediction_type=_form(schedule), **zero_snr
    )
    scheduler.set_timesteps(steps)
    return scheduler


def no_label(unet: Any) -> int:
    """The label of a conditional UNet that means no label: its last one; with prompts, the empty prompt."""
    prompts = getattr(unet, PROMPTS, None)
    return (unet.config.num_class_embeds if prompts is None else len(prompts)) - 1


def _predict_guided(unet: Any, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """The UNet's prediction with classifier-free guidance (arXiv 2207.12598, whose w is guidance - 1)."""
    if labels is None:
        return unet(x_t, t).sample
    if guidance == 1:
        return unet(x_t, t, class_labels=labels).sample
    both = torch.cat((labels, torch.full_like(labels, no_label(unet))))
    conditional, unconditional = unet(torch.cat((x_t, x_t)), t, class_labels=both).sample.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _advise(unet: nn.Module) -> str:
    """What to do about predictions that are not finite."""
    for name, buffer in unet.named_buffers():
        if name.endswith("running_var") and (buffer < 0).any():
            return f"{name} has negative entries: use GroupNorm in place of BatchNorm"
    return "lower optimizer.lr or epochs, or set trainer.gradient_clip_val"
