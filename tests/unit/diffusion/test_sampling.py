"""Sampling: images follow the seed, and perfect denoisers recover known images and noise."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from denoisers import SAMPLERS, Oracle
from diffusers import DDPMScheduler
from torch import Tensor, nn

from fedlight.diffusion.sampling import check_sampler, sample, sample_together, sampling_steps
from fedlight.diffusion.unet import ConvNextUNet
from fedlight.runtime.errors import BadInput, Diverged

DETERMINISTIC = {"ddim", "dpm-solver++"}
SCHEDULE = DDPMScheduler(num_train_timesteps=1000)


def tiny_unet(channels: int = 1) -> ConvNextUNet:
    torch.manual_seed(0)
    return ConvNextUNet(
        sample_size=8, in_channels=channels, dim=8, dim_mults=(1, 2), heads=2, head_width=8
    ).eval()


def oracle(beta_schedule: str = "linear") -> tuple[Oracle, DDPMScheduler, Tensor]:
    """The oracle, its schedule, and the image that it knows, in grey levels."""
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule=beta_schedule)
    beta = schedule.betas.double()
    levels = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(3))
    levels[:, 0, :2] = torch.tensor([0, 255])  # both ends of the range
    return Oracle(levels / 127.5 - 1, (1 - beta).cumprod(0)), schedule, levels


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_are_uint8_of_the_given_shape_on_the_cpu(sampler: str) -> None:
    images = sample(tiny_unet(3), SCHEDULE, (5, 3, 8, 8), sampler=sampler, steps=4, seed=0, batch_size=2)
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert images.device.type == "cpu"
    assert not images.requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides_the_images(sampler: str) -> None:
    def draw(seed: int) -> Tensor:
        return sample(tiny_unet(), SCHEDULE, (3, 1, 8, 8), sampler=sampler, steps=5, seed=seed)

    first = draw(1)
    torch.manual_seed(99)  # what else was drawn does not matter
    torch.randn(10)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_leaves_the_global_random_numbers_alone(sampler: str) -> None:
    unet, before = tiny_unet(), torch.get_rng_state()
    sample(unet, SCHEDULE, (2, 1, 8, 8), sampler=sampler, steps=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_images_do_not_depend_on_the_number_of_workers(sampler: str) -> None:
    alone, *others = (
        sample(
            tiny_unet(),
            SCHEDULE,
            (13, 1, 8, 8),
            sampler=sampler,
            steps=5,
            seed=1,
            batch_size=4,
            workers=workers,
        )
        for workers in (1, 2, 3)
    )
    assert all(torch.equal(images, alone) for images in others)


def test_an_error_of_a_step_ends_the_sampling_by_many_workers() -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    unet, schedule, _ = oracle()
    with pytest.raises(KeyboardInterrupt):
        sample(
            unet,
            schedule,
            (64, 3, 8, 8),
            sampler="ddim",
            steps=5,
            seed=0,
            batch_size=1,
            workers=2,
            on_step=stop,
        )
    assert len(calls) < 64


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_a_deterministic_sampler_draws_the_same_images_in_batches_of_any_size(sampler: str) -> None:
    whole, split = (
        sample(tiny_unet(), SCHEDULE, (7, 1, 8, 8), sampler=sampler, steps=5, seed=1, batch_size=size)
        for size in (7, 3)
    )
    assert (whole.int() - split.int()).abs().max() <= 1


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_recovers_the_only_image_there_is(sampler: str, beta_schedule: str, steps: int) -> None:
    unet, schedule, x_0 = oracle(beta_schedule)
    images = sample(unet, schedule, (2, 3, 8, 8), sampler=sampler, steps=steps, seed=1)
    assert (images.int() - x_0).abs().max() <= 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_starts_from_the_noisiest_step_and_falls_evenly(sampler: str) -> None:
    unet, schedule, _ = oracle()
    sample(unet, schedule, (1, 3, 8, 8), sampler=sampler, steps=5, seed=1)
    assert unet.steps == [999, 799, 599, 399, 199]


class Overshooter(Oracle):
    """An oracle of an image 1.5 times as far from grey, beyond black and white; measures its inputs."""

    def __init__(self, x_0: Tensor, alpha_bar: Tensor) -> None:
        super().__init__(1.5 * x_0, alpha_bar)
        self.noise: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        alpha_bar = self.alpha_bar[t]
        noise = (x_t - alpha_bar.sqrt() * self.x_0 / 1.5) / (1 - alpha_bar).sqrt()
        self.noise.append(noise.square().mean().sqrt().item())
        return super().forward(x_t, t)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_x_t_keeps_its_noise_level_where_predictions_are_clipped(sampler: str, beta_schedule: str) -> None:
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule=beta_schedule)
    x_0 = torch.tensor([-1.0, 1.0]).repeat(3, 8, 4)
    unet = Overshooter(x_0, schedule.alphas_cumprod)
    sample(unet, schedule, (8, 3, 8, 8), sampler=sampler, steps=50, seed=1)
    assert len(unet.noise) == 50
    assert min(unet.noise) > 0.9
    assert max(unet.noise) < 1.1


class Listener(Oracle):
    """An oracle that keeps the noise of each x_t that it is asked about."""

    def __init__(self, x_0: Tensor, alpha_bar: Tensor) -> None:
        super().__init__(x_0, alpha_bar)
        self.heard: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        alpha_bar = self.alpha_bar[t]
        self.heard.append(((x_t - alpha_bar.sqrt() * self.x_0) / (1 - alpha_bar).sqrt()).flatten())
        return super().forward(x_t, t)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_ode_keeps_its_noise_and_an_sde_draws_as_much_anew_as_the_posterior_does(
    sampler: str, beta_schedule: str
) -> None:
    """Of one image x_0 the step from t to s is known: q(x_s | x_t, x_0) (DDPM, arXiv 2006.11239, eq. 7).

    Its mean holds x_t times sqrt(alpha_bar_t / alpha_bar_s) (1 - alpha_bar_s) / (1 - alpha_bar_t), so the
    noises of x_t and x_s, each of variance 1, correlate by r = sqrt(alpha_bar_t (1 - alpha_bar_s) /
    (alpha_bar_s (1 - alpha_bar_t))). The ODEs of DDIM and DPM-Solver++ hand the noise on as it is: r = 1.
    """
    known, schedule, _ = oracle(beta_schedule)
    unet = Listener(known.x_0, known.alpha_bar)
    sample(unet, schedule, (64, 3, 8, 8), sampler=sampler, steps=20, seed=1)
    alpha_bar = known.alpha_bar[unet.steps]
    assert len(unet.heard) == 20
    for step, ((before, after), (at_t, at_s)) in enumerate(
        zip(pairwise(unet.heard), pairwise(alpha_bar.tolist()), strict=True)
    ):
        r = (at_t * (1 - at_s) / (at_s * (1 - at_t))) ** 0.5
        expected = 1 if sampler in DETERMINISTIC else r
        assert torch.corrcoef(torch.stack((before, after)))[0, 1].item() == pytest.approx(expected, abs=0.03)
        assert after.std().item() == pytest.approx(1, abs=0.03), step
        assert after.mean().item() == pytest.approx(0, abs=0.03), step
    assert r < 0.8  # of the last step: far from 1


class Gaussian(nn.Module):
    """Knows the noise to be expected in x_t where pixels are independent and normal."""

    def __init__(self, mean: float, std: float, alpha_bar: Tensor) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), std
        self.alpha_bar = alpha_bar.double()
        self.first: Tensor | None = None

    def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        if self.first is None:
            self.first = x_t.flatten()
        alpha_bar = self.alpha_bar[t]
        variance = alpha_bar * self.std**2 + 1 - alpha_bar  # of x_t
        eps = (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * self.mean) / variance
        return SimpleNamespace(sample=eps.to(x_t.dtype))


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddpm", 500), ("ddim", 500), ("dpm-solver++", 50), ("sde-dpm-solver++", 50)]
)
def test_images_of_known_mean_and_variance_have_them_and_stem_from_the_first_noise_of_an_ode_only(
    sampler: str, steps: int, beta_schedule: str
) -> None:
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule=beta_schedule)
    unet = Gaussian(0.1, 0.25, schedule.alphas_cumprod)
    images = sample(unet, schedule, (100, 1, 10, 10), sampler=sampler, steps=steps, seed=1)
    values = images.flatten() / 127.5 - 1
    assert values.mean().item() == pytest.approx(0.1, abs=0.012)
    assert values.std().item() == pytest.approx(0.25, abs=0.0125)
    assert unet.first is not None
    share = torch.corrcoef(torch.stack((unet.first, values)))[0, 1].item()
    assert share == pytest.approx(1 if sampler in DETERMINISTIC else 0, abs=0.05)


@pytest.mark.parametrize("steps", [7, 61, 600])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_that_do_not_divide_the_schedule_are_refused(sampler: str, steps: int) -> None:
    unet, schedule, _ = oracle()
    with pytest.raises(BadInput, match=rf"evaluation\.steps must divide 1000, .* got {steps}"):
        sample(unet, schedule, (1, 3, 8, 8), sampler=sampler, steps=steps, seed=1)


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"one of ddpm, ddim, dpm-solver\+\+, sde-dpm-solver\+\+, got euler"):
        sample(tiny_unet(), SCHEDULE, (1, 1, 8, 8), sampler="euler", steps=5, seed=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_than_the_schedule_has_are_refused(sampler: str) -> None:
    schedule = DDPMScheduler(num_train_timesteps=20)
    check_sampler(sampler, 20, schedule)
    with pytest.raises(BadInput, match=r"evaluation\.steps must be at most 20, .* got 21"):
        sample(tiny_unet(), schedule, (1, 1, 8, 8), sampler=sampler, steps=21, seed=0)


@pytest.mark.parametrize("training", [True, False])
def test_sampling_uses_evaluation_mode_and_restores_the_mode(training: bool) -> None:
    unet, schedule, _ = oracle()
    unet.train(training)
    sample(unet, schedule, (2, 3, 8, 8), sampler="ddim", steps=2, seed=0, batch_size=1)
    assert unet.modes == [False] * 4
    assert unet.training is training


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_step_is_called_once_for_each_step_of_each_batch(sampler: str) -> None:
    calls: list[int] = []
    unet, schedule, _ = oracle()
    sample(
        unet,
        schedule,
        (5, 3, 8, 8),
        sampler=sampler,
        steps=4,
        seed=0,
        batch_size=2,
        on_step=lambda: calls.append(len(unet.steps)),
    )
    assert calls == list(range(1, 4 * 3 + 1))  # 4 steps, batches of 2, 2 and 1; after each prediction


@pytest.mark.parametrize("images", [255, 256, 257, 600])
def test_the_number_of_sampling_steps_is_known_in_advance(images: int) -> None:
    calls: list[int] = []
    unet, schedule, _ = oracle()
    sample(
        unet,
        schedule,
        (images, 3, 8, 8),
        sampler="ddim",
        steps=2,
        seed=0,
        on_step=lambda: calls.append(1),
    )
    assert sampling_steps(images, 2) == len(calls)


# ---- zero terminal SNR (arXiv 2305.08891)

BETAS = torch.linspace(1e-4, 0.02, 999, dtype=torch.float64).tolist()
ZERO_SNR = {
    "rescaled linear": DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "rescaled cosine": DDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, beta_schedule="squaredcos_cap_v2"
    ),
    "last beta 1": DDPMScheduler(prediction_type="v_prediction", trained_betas=[*BETAS, 1.0]),
    "nearly zero": DDPMScheduler(prediction_type="v_prediction", trained_betas=[*BETAS, 1 - 1e-12]),
}


class VelocityOracle(nn.Module):
    """Knows the one grey level of all pixels, and so v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""

    def __init__(self, level: float, alpha_bar: Tensor) -> None:
        super().__init__()
        self.x_0, self.alpha_bar = nn.Parameter(torch.tensor(level)), alpha_bar.double()
        self.noise: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        alpha_bar = self.alpha_bar[t]
        eps = (x_t - alpha_bar.sqrt() * self.x_0) / (1 - alpha_bar).sqrt()
        self.noise.append(eps)
        velocity = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * self.x_0
        return SimpleNamespace(sample=velocity.to(x_t.dtype))


def test_rescaled_schedules_end_in_pure_noise_as_the_paper_says() -> None:
    """Algorithm 1: sqrt(alpha_bar) is shifted to 0 at T and scaled so that the first one stays."""
    root = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    actual = ZERO_SNR["rescaled linear"].alphas_cumprod.double()
    assert actual[-1] == 0
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("schedule", ZERO_SNR.values(), ids=ZERO_SNR.keys())
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_pure_noise_every_sampler_follows_the_velocity_to_the_image(
    sampler: str, schedule: DDPMScheduler, steps: int
) -> None:
    unet = VelocityOracle(0.6, schedule.alphas_cumprod)
    images = sample(unet, schedule, (16, 3, 8, 8), sampler=sampler, steps=steps, seed=1)
    assert (images.int() - round((0.6 + 1) * 127.5)).abs().max() <= 1
    for noise in unet.noise:  # x_t holds the image in the proportion that its step says
        assert noise.mean().item() == pytest.approx(0, abs=0.06)
        assert noise.std().item() == pytest.approx(1, abs=0.06)


def test_from_pure_noise_ddim_takes_the_steps_of_its_equation() -> None:
    """x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s) eps (arXiv 2010.02502, eq. 12 without noise)."""
    schedule = ZERO_SNR["rescaled linear"]
    alpha_bar = schedule.alphas_cumprod.double()

    class Linear(VelocityOracle):
        def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=0.3 * x_t - self.x_0)

    x = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(1)).double()
    for t, s in [(999, 749), (749, 499), (499, 249), (249, None)]:
        at, after = alpha_bar[t], torch.tensor(1.0).double() if s is None else alpha_bar[s]
        x_0 = (at.sqrt() * x - (1 - at).sqrt() * (0.3 * x - 0.2)).clamp(-1, 1)
        eps = (x - at.sqrt() * x_0) / (1 - at).sqrt()
        x = after.sqrt() * x_0 + (1 - after).sqrt() * eps
    images = sample(Linear(0.2, alpha_bar), schedule, (4, 1, 8, 8), sampler="ddim", steps=4, seed=1)
    assert (images.double() - (x.clamp(-1, 1) + 1) * 127.5).abs().max() <= 0.51


# ---- predictions that are not finite


class Broken(nn.Module):
    """Predicts a value for one pixel from time step 599 on."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        predicted = torch.zeros_like(x_t)
        if t < 600:
            predicted[-1, 0, 0, 0] = self.value
        return SimpleNamespace(sample=predicted)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_that_are_not_finite_are_refused_with_the_model_and_the_step(
    sampler: str, value: float, workers: int
) -> None:
    message = r"client 7 draws images .* not finite, from denoising step 3 of 5 \(t = 599\) on; lower"
    with pytest.raises(Diverged, match=message):
        sample(
            Broken(value),
            SCHEDULE,
            (3, 1, 8, 8),
            sampler=sampler,
            steps=5,
            seed=0,
            batch_size=2,
            workers=workers,
            model="client 7",
        )


def test_a_negative_running_variance_is_named() -> None:
    unet = Broken(float("nan"))
    unet.norm.running_var.fill_(-1e-3)
    with pytest.raises(Diverged, match=r"norm\.running_var has negative entries"):
        sample(unet, SCHEDULE, (1, 1, 8, 8), sampler="ddim", steps=5, seed=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("bound", "grey"), [(None, 191), (4.0, 191), (1.5, 159)])  # 0.5 and 0.25 in [-1, 1]
def test_latents_are_clipped_where_the_schedule_says_so_and_every_image_and_frame_is_decoded(
    sampler: str, bound: float | None, grey: int
) -> None:
    schedule = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=bound is not None, clip_sample_range=bound or 1.0
    )
    unet = Oracle(torch.full((1, 2, 4, 4), 3.0), schedule.alphas_cumprod)

    def decode(latents: Tensor) -> Tensor:
        return latents[:, :1].repeat(1, 1, 2, 2) / 6

    frames: list[Tensor] = []
    images = sample(
        unet,
        schedule,
        (3, 2, 4, 4),
        sampler=sampler,
        steps=5,
        seed=1,
        on_frame=frames.append,
        decode=decode,
    )
    assert torch.equal(images, torch.full((3, 1, 8, 8), grey, dtype=torch.uint8))
    assert [frame.shape for frame in frames] == [(3, 1, 8, 8)] * 5
    assert torch.equal(frames[-1], images)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [None, 1.0, 3.0])
def test_several_models_together_draw_what_each_draws_alone(sampler: str, guidance: float | None) -> None:
    """Three models of 5 images in batches of 2; a rounding error may cross the border of two grey levels."""
    labels = None if guidance is None else torch.arange(5) % 3
    settings: dict[str, Any] = {"sampler": sampler, "steps": 4, "batch_size": 2, "labels": labels}
    settings["guidance"] = guidance or 1.0
    unets = []
    for seed in range(3):
        torch.manual_seed(seed)
        embedding = {} if guidance is None else {"num_class_embeds": 4}
        unets.append(
            ConvNextUNet(sample_size=8, dim=8, dim_mults=(1, 2), heads=2, head_width=8, **embedding).eval()
        )
    shape = (5, 1, 8, 8)
    alone = [sample(unet, SCHEDULE, shape, seed=7 + i, **settings) for i, unet in enumerate(unets)]
    weights, names, counted = [dict(unet.named_parameters()) for unet in unets], ["a", "b", "c"], []
    together = sample_together(
        unets[0],
        weights,
        SCHEDULE,
        shape,
        seeds=[7, 8, 9],
        models=names,
        on_step=lambda: counted.append(1),
        **settings,
    )
    assert len(counted) == 3 * sampling_steps(5, 4) * 3  # three batches of each model, not one
    for one, other in zip(alone, together, strict=True):
        difference = (one.int() - other.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01
    assert not torch.equal(alone[0], alone[1])


def test_a_model_that_diverges_among_others_is_named() -> None:
    unets = [tiny_unet(), tiny_unet()]
    with torch.no_grad():
        next(unets[1].parameters()).fill_(float("nan"))
    weights = [dict(unet.named_parameters()) for unet in unets]
    settings: dict[str, Any] = {"sampler": "ddim", "steps": 2, "seeds": [1, 2], "models": ["one", "two"]}
    with pytest.raises(Diverged, match="two draws images that are not finite, from denoising step 1 of 2"):
        sample_together(unets[0], weights, SCHEDULE, (2, 1, 8, 8), **settings)
