"""Predictions of noise and velocity imply the image and the noise that they were made from."""

import pytest
import torch

from fedlight.diffusion.prediction import PREDICTIONS, VELOCITY, noise_between, to_image, to_noise


@pytest.mark.parametrize("alpha_bar", [0.0, 1e-4, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_prediction_gives_back_the_image_and_the_noise(
    prediction_type: str, alpha_bar: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x_t = alpha * x_0 + sigma * eps
    predicted = alpha * eps - sigma * x_0 if prediction_type == VELOCITY else eps
    level = torch.tensor(alpha_bar, dtype=torch.float64)
    torch.testing.assert_close(to_noise(predicted, x_t, level, prediction_type), eps)
    if prediction_type == VELOCITY or alpha_bar > 0:
        torch.testing.assert_close(to_image(predicted, x_t, level, prediction_type), x_0)
    if alpha_bar < 1:
        torch.testing.assert_close(noise_between(x_0, x_t, level), eps)
