"""The denoising diffusion model that a client trains (DDPM, arXiv 2006.11239)."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fedlight.diffusion.prediction import PREDICTIONS, VELOCITY
from fedlight.diffusion.sampling import no_label
from fedlight.diffusion.stacked_unet import can_stack, predict
from fedlight.runtime.errors import BadInput
from fedlight.runtime.resident_module import ResidentModule

LOSSES: dict[str, Callable[..., Tensor]] = {
    "huber": F.smooth_l1_loss,
    "mse": F.mse_loss,
}


class DDPM(ResidentModule):
    """Trains a UNet to predict the noise in an image (FedDiffuse, section 3; DDPM, algorithm 1).

    With a schedule of `prediction_type` v_prediction the UNet predicts the velocity sqrt(alpha_bar) eps -
    sqrt(1 - alpha_bar) x_0 instead (arXiv 2202.00512).

    A batch is a float tensor of images in [-1, 1], or of latents, shape (n, channels, height, width); for a
    conditional model, these and labels, int64, shape (n,).

    Args:
        unet: predicts the noise or the velocity, called as `unet(x_t, t).sample`.
        schedule: the noise schedule, which defines alpha_bar and the number of time steps T.
        loss: between target and prediction, `huber` (smooth L1, beta = 1) or `mse`.
        optimizer: makes the optimizer from the parameters, once a fit.
        slices: name of each slice -> prefixes of the UNet's parameter names.
        ema_decay: decay per step of an exponential moving average of the UNet; None for no average.
        exchange_ema: whether the average belongs to the slices and is exchanged with them.
        snr_gamma: clip of the signal-to-noise ratio in min-SNR weighting (arXiv 2303.09556), above 0; None
            for equal weights of all time steps.
        label_dropout: probability that an image's label is replaced by the UNet's last one, which means no
            label (classifier-free guidance, arXiv 2207.12598); None for an unconditional model.
        frozen: state_dict names of the UNet that are not trained; they are in no state_dict of this module.

    Attributes:
        slices: name of each slice -> prefixes of this module's state_dict names.
        private: prefixes of the state_dict names that belong to no slice and never leave a client.
        counters: state_dict names of integers that count steps, and decide nothing once they are not 0.

    Raises:
        BadInput: unknown loss, a decay outside (0, 1), an unknown `prediction_type` or no time steps, betas
            outside [0, 1], or epsilon prediction with a schedule whose last step is pure noise.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: DDPMScheduler,
        loss: str,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        slices: Mapping[str, Sequence[str]],
        ema_decay: float | None = None,
        exchange_ema: bool = False,
        snr_gamma: float | None = None,
        label_dropout: float | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise BadInput(f"model.loss must be one of {', '.join(LOSSES)}, got {loss}")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise BadInput(f"model.ema_decay must lie between 0 and 1, got {ema_decay}")
        if schedule.config.prediction_type not in PREDICTIONS or schedule.config.num_train_timesteps < 1:
            raise BadInput(
                f"model.schedule must have prediction_type {' or '.join(PREDICTIONS)} and at least one time "
                f"step, got {schedule.config.prediction_type} and {schedule.config.num_train_timesteps}"
            )
        _check_alpha_bar(schedule)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.schedule = schedule
        self.loss = LOSSES[loss]
        self.snr_gamma = snr_gamma
        self.label_dropout = label_dropout
        self.optimizer = optimizer
        self.ema: AveragedModel | None = None
        self._stackable: bool | None = None
        self.counters = () if ema_decay is None else ("ema.n_averaged",)
        if ema_decay is not None:
            self.ema = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.slices = {name: [f"unet.{p}" for p in prefixes] for name, prefixes in slices.items()}
        self.private: tuple[str, ...] = ("ema",)
        if exchange_ema and self.ema is not None:
            for name, prefixes in slices.items():
                self.slices[name] += [f"ema.module.{p}" for p in prefixes]
            next(iter(self.slices.values())).append("ema.n_averaged")
            self.private = ()
        self.leave_out(f"{place}.{name}" for name in frozen for place in ("unet", "ema.module"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mean loss between target and prediction at uniformly drawn time steps."""
        return self.loss_of(self.draw(batch))

    def draw(self, batch: Any) -> dict[str, Tensor]:
        """Draws all random numbers of a training step.

        Returns:
            The images `x_0`, their time steps `t`, the noise `eps`, and for a conditional model the
            `class_labels`, some of them dropped; the first dimension is that of the images.
        """
        if self.label_dropout is None:
            x_0, condition = batch, {}
        else:
            x_0, condition = batch[0], {"class_labels": self._drop_labels(batch[1], self.label_dropout)}
        t = torch.randint(self.schedule.config.num_train_timesteps, x_0.shape[:1], device=x_0.device)
        return {"x_0": x_0, "t": t, "eps": torch.randn_like(x_0), **condition}

    def loss_of(self, drawn: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """The loss of a training step; it draws no random numbers.

        Args:
            drawn: by `draw`.
            weights: of the images' losses in their sum, shape (n,); None for the mean.
        """
        x_0, t, eps = drawn["x_0"], drawn["t"], drawn["eps"]
        condition = {"class_labels": drawn["class_labels"]} if "class_labels" in drawn else {}
        x_t = self.schedule.add_noise(x_0, eps, t)  # sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
        predicted = self.unet(x_t, t, **condition).sample
        velocity = self.schedule.config.prediction_type == VELOCITY
        target = self.schedule.get_velocity(x_0, eps, t) if velocity else eps
        if self.snr_gamma is None and weights is None:
            return self.loss(predicted, target)
        losses = self._image_losses(predicted, target, t)
        return losses.mean() if weights is None else (weights * losses).sum()

    def stacked_losses(self, drawn: Mapping[str, Tensor], weights: Tensor) -> Tensor | None:
        """The losses of several clients, where this module's parameters have a further first dimension.

        Args:
            drawn: by `draw` for each client, stacked.
            weights: of the images' losses in their sums, shape (clients, n).

        Returns:
            The loss of each client, shape (clients,); None for a UNet that only `torch.func.vmap` can stack.
        """
        if self._stackable is None:
            self._stackable = not self.frozen and can_stack(self.unet)
        if not self._stackable:
            return None
        x_0, t, eps = (drawn[name].flatten(0, 1) for name in ("x_0", "t", "eps"))
        x_t = self.schedule.add_noise(x_0, eps, t).unflatten(0, weights.shape)
        unet: Any = self.unet
        predicted = predict(unet, x_t, drawn["t"], drawn.get("class_labels")).flatten(0, 1)
        velocity = self.schedule.config.prediction_type == VELOCITY
        target = self.schedule.get_velocity(x_0, eps, t) if velocity else eps
        losses = self._image_losses(predicted, target, t).unflatten(0, weights.shape)
        return (weights * losses).sum(dim=1)

    def _image_losses(self, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The loss of each image, by min-SNR weighting where it is set."""
        losses: Tensor = self.loss(predicted, target, reduction="none").flatten(1).mean(dim=1)
        if self.snr_gamma is None:
            return losses
        alpha_bar = self.schedule.alphas_cumprod.to(t.device)[t]
        snr = alpha_bar / (1 - alpha_bar)
        velocity = self.schedule.config.prediction_type == VELOCITY
        return snr.clamp(max=self.snr_gamma) / (snr + 1 if velocity else snr) * losses

    def _drop_labels(self, labels: Tensor, probability: float) -> Tensor:
        dropped = torch.rand(labels.shape, device=labels.device) < probability
        return labels.masked_fill(dropped, no_label(self.unet))

    def on_train_batch_end(self, outputs: object, batch: Any, batch_idx: int) -> None:
        if self.ema is not None:
            self.ema.update_parameters(self.unet)

    def configure_optimizers(self) -> Optimizer:
        named = self.unet.named_parameters()
        return self.optimizer(parameter for name, parameter in named if f"unet.{name}" not in self.frozen)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet to sample from: its moving average where there is one, otherwise the trained UNet."""
        if self.ema is not None and self.ema.n_averaged > 0:
            return self.ema.module
        return self.unet


def _check_alpha_bar(schedule: DDPMScheduler) -> None:
    """Raises BadInput for a beta outside [0, 1], and for epsilon prediction where alpha_bar is 0.

    At alpha_bar = 0 (zero terminal SNR, arXiv 2305.08891) x_t is the noise itself, and its prediction
    contains no information about the image.
    """
    if not ((schedule.betas >= 0) & (schedule.betas <= 1)).all():
        raise BadInput(
            f"model.schedule must have betas between 0 and 1, got {schedule.betas.min():g} to "
            f"{schedule.betas.max():g}"
        )
    if schedule.config.prediction_type == "epsilon" and (schedule.alphas_cumprod == 0).any():
        raise BadInput(
            "model.schedule ends in pure noise (alpha_bar = 0, as by rescale_betas_zero_snr), from which "
            f"epsilon prediction gives no image: add +model.schedule.prediction_type={VELOCITY}, or leave "
            "rescale_betas_zero_snr out"
        )
