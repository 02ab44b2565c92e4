"""What a UNet predicts, the noise or the velocity, and the image or the noise that follows from it."""

from torch import Tensor

VELOCITY = "v_prediction"
PREDICTIONS = ("epsilon", VELOCITY)  # as diffusers names them


def to_image(predicted: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The image x_0 that a prediction at x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps implies.

    The velocity is v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512).

    Args:
        predicted: the UNet's output, of the shape of `x_t`.
        x_t: noisy images, float, shape (n, channels, height, width).
        alpha_bar: in (0, 1] for epsilon, in [0, 1] for the velocity; broadcast against `x_t`.
        prediction_type: one of PREDICTIONS.
    """
    if prediction_type == VELOCITY:
        return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * predicted
    return (x_t - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()


def to_noise(predicted: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise eps that a prediction at x_t implies; arguments of `to_image`."""
    if prediction_type == VELOCITY:
        return alpha_bar.sqrt() * predicted + (1 - alpha_bar).sqrt() * x_t
    return predicted


def noise_between(x_0: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that leads from the image x_0 to x_t; `alpha_bar` is below 1."""
    return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
