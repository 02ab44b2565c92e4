"""Images become latents and latents images as by the autoencoder alone; they are encoded once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from pipelines import make_vae

from fedlight.finetuning.latents import BATCH, LatentSpace
from fedlight.finetuning.start import make_latent_schedule
from fedlight.runtime.errors import BadInput

CPU = torch.device("cpu")
GREY, COLOUR = (1, 8, 8), (3, 8, 8)


def images(shape: tuple[int, int, int], count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_latents_are_the_scaled_mean_of_the_posterior_or_the_vectors_before_quantisation(kind: str) -> None:
    vae, pixels = make_vae(kind).eval(), images(GREY)
    space = LatentSpace(make_vae(kind), GREY)
    with torch.no_grad():
        floats = pixels.float() / 127.5 - 1
        moments = vae.quant_conv(vae.encoder(floats))
        mean = moments[:, :2]  # of a VQModel these are all channels
        decoded = vae.decode(mean).sample
    encoded = space.encode(pixels)
    assert space.shape == tuple(encoded.shape[1:]) == (2, 4, 4)
    assert torch.allclose(encoded, 0.5 * mean, atol=1e-6)
    assert torch.allclose(space.decode(encoded), decoded, atol=1e-6)
    assert decoded.std() > 0.01


def test_grey_images_are_repeated_for_an_autoencoder_of_colour_and_averaged_afterwards() -> None:
    space, coloured = LatentSpace(make_vae(channels=3), GREY), LatentSpace(make_vae(channels=3), COLOUR)
    pixels = images(GREY)
    latents = space.encode(pixels)
    assert torch.equal(latents, coloured.encode(pixels.repeat(1, 3, 1, 1)))
    decoded = coloured.decode(6 * latents)
    assert decoded.abs().max() > 1
    grey = decoded.clamp(-1, 1).mean(dim=1, keepdim=True)
    assert torch.equal(space.decode(6 * latents), grey)


def test_nothing_of_the_autoencoder_is_trained() -> None:
    vae = make_vae()
    LatentSpace(vae, GREY)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize("count", [1, BATCH, 2 * BATCH + 3])
def test_a_data_set_is_encoded_once(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    space, pixels = LatentSpace(make_vae(), GREY), images(GREY, count)
    first = space.encode_cached(pixels, str(tmp_path), CPU)
    assert torch.equal(first, space.encode(pixels))
    monkeypatch.setattr(LatentSpace, "_encode_batch", None)
    again = space.encode_cached(pixels.clone(), str(tmp_path), CPU)
    assert torch.equal(first, again)
    assert again.dtype == torch.float32


def test_other_images_other_weights_and_damaged_files_are_encoded_anew(tmp_path: Path) -> None:
    space, pixels = LatentSpace(make_vae(), GREY), images(GREY)
    kept = space.encode_cached(pixels, str(tmp_path), CPU).clone()
    (file,) = tmp_path.glob("latents/*.npy")
    other = pixels.clone()
    other[0, 0, 0, 0] ^= 1
    assert not torch.equal(space.encode_cached(other, str(tmp_path), CPU), kept)
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.weight *= 2
    assert not torch.allclose(LatentSpace(vae, GREY).encode_cached(pixels, str(tmp_path), CPU), kept)
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(space.encode_cached(pixels, str(tmp_path), CPU), kept)
    assert np.load(file).shape == (5, 2, 4, 4)


@pytest.mark.parametrize(
    ("channels", "shape", "message"),
    [
        (1, (1, 9, 9), r"data\.image_size=9: .*multiple of 2: choose 8 or 10"),
        (1, (1, 1, 1), r"data\.image_size=1: .*multiple of 2: choose 2$"),
        (1, (3, 8, 8), r"data\.channels=3: .*takes 1 channels"),
        (3, (4, 8, 8), r"data\.channels=4: .*takes 3 channels"),
    ],
)
def test_images_that_the_autoencoder_cannot_take_are_an_error_of_one_line(
    channels: int, shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(BadInput, match=message) as error:
        LatentSpace(make_vae(channels=channels), shape)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scaling", [0, -0.5, float("nan"), "x", None])
def test_an_autoencoder_of_no_scale_is_an_error_of_one_line(scaling: object) -> None:
    vae = make_vae()
    vae.register_to_config(scaling_factor=scaling)
    with pytest.raises(BadInput, match=r"^finetuning\.pretrained: scaling_factor of the AutoencoderKL must"):
        LatentSpace(vae, GREY)


@pytest.mark.parametrize(
    ("options", "clipped"),
    [
        ({"beta_schedule": "linear"}, False),
        ({"beta_schedule": "scaled_linear", "clip_sample_range": 5.0}, True),
        ({"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 4.0}, True),
        ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, False),
    ],
)
def test_latents_are_clipped_to_a_range_that_is_not_that_of_images(
    options: dict[str, Any], clipped: bool
) -> None:
    schedule = make_latent_schedule(DDPMScheduler(**options))
    assert schedule.config.clip_sample is clipped
    assert schedule.config.beta_schedule == options["beta_schedule"]


@pytest.mark.parametrize("clip", [{}, {"clip_sample": False, "clip_sample_range": 4.0}])
def test_predicted_noise_without_signal_needs_clipped_latents(clip: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"squaredcos_cap_v2\) leaves alpha_bar = 2e-09 of the signal"):
        make_latent_schedule(DDPMScheduler(beta_schedule="squaredcos_cap_v2", **clip))
