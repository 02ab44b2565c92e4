"""Example-level privacy: DP-SGD (arXiv 1607.00133) in a client's Trainer, by Opacus."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.optim import SGD
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fedlight.privacy.account import MISSING_LIBRARIES
from fedlight.runtime.errors import BadInput
from fedlight.runtime.system_random import SystemGenerator
from fedlight.runtime.vmap import vmap

CHUNK = 16  # images whose gradients are in memory at once

MAX_CLIP = torch.finfo(torch.float32).max  # in place of an infinite clip, since 0 * inf is NaN


class PrivateGradients(Callback):
    """Replaces the gradient of each training step by the private gradient.

    The gradient of each image's mean loss over several draws of noise and time (DPDM, arXiv 2210.09929) is
    clipped; Gaussian noise is added to their sum over the batch, which is divided by the expected batch size.
    Batches are Poisson samples and may be empty. Later steps, such as the optimizer, a proximal term or a
    moving average, receive the private gradient only.

    Args:
        noise: standard deviation of the noise on the sum, in units of `clip`, 0 or more.
        clip: largest L2 norm of an image's gradient; larger ones are scaled down to it.
        batch_size: expected number of images in a batch.
        draws: number of draws of noise and time for each image and step.
        secret: draw the noise from the operating system's cryptographic generator, not from torch's seed.

    Raises:
        BadInput: Opacus is not installed.
    """

    def __init__(self, noise: float, clip: float, batch_size: float, draws: int, secret: bool) -> None:
        try:
            from opacus.optimizers import DPOptimizer
        except ImportError as error:
            raise BadInput(MISSING_LIBRARIES) from error
        self._make = DPOptimizer
        self._mechanism: dict[str, Any] = {
            "noise_multiplier": 0.0 if secret else noise,
            "max_grad_norm": min(clip, MAX_CLIP),
            "expected_batch_size": batch_size,
        }
        self._draws = draws
        self._secret_deviation = noise * min(clip, MAX_CLIP) if secret else 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self._parameters = {name: p for name, p in pl_module.named_parameters() if id(p) in trained}
        # clips gradients and adds seeded noise; it never steps
        self._optimizer = self._make(SGD(self._parameters.values()), **self._mechanism)
        self._step = TrainingStep(pl_module)
        object.__setattr__(pl_module, "training_step", self.training_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if vars(pl_module).get("training_step") == self.training_step:
            object.__delattr__(pl_module, "training_step")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mean loss of the batch, whose gradient is the private gradient."""
        device = tree_leaves(batch)[0].device
        loss = torch.zeros((), device=device)
        images = len(tree_leaves(batch)[0])
        for chunk in _chunks(batch):
            gradients, losses = per_sample_gradients(self._step, self._parameters, chunk, self._draws)
            loss += losses.sum() / max(1, images)
            for name, parameter in self._parameters.items():
                parameter.grad_sample = gradients[name]  # type: ignore[attr-defined]
            with torch.autocast(device.type, enabled=False):  # norms, clipping and sums in float32
                self._optimizer.clip_and_accumulate()
        self._optimizer.add_noise()
        if self._secret_deviation:
            self._add_secret_noise()
        self._optimizer.scale_grad()
        for parameter in self._parameters.values():  # the term is 0, and its gradient is the private gradient
            assert parameter.grad is not None
            loss = loss + (parameter.grad.clone() * (parameter - parameter.detach())).sum()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _add_secret_noise(self) -> None:
        """Adds noise, drawn in float64 on the CPU, to the sum of each parameter's clipped gradients."""
        system = SystemGenerator()
        for parameter in self._parameters.values():
            assert parameter.grad is not None
            noise = self._secret_deviation * system.standard_normal(tuple(parameter.shape))
            parameter.grad += torch.from_numpy(noise).to(parameter.grad.dtype).to(parameter.grad.device)


class TrainingStep(nn.Module):
    """The training step of a LightningModule as a module's `forward`."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        step: Any = type(self.module).training_step
        loss: Tensor = step(self.module, batch, 0)
        return loss


def per_sample_gradients(
    step: TrainingStep, parameters: dict[str, nn.Parameter], batch: Any, draws: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of each image's loss, and the losses, shape (n,).

    Args:
        step: the training step of the module.
        parameters: of the module, by name.
        batch: tensors whose first dimension is the n images.
        draws: number of copies of an image in its batch, each with its own random draws.
    """

    def loss(values: dict[str, Tensor], image: Any) -> Tensor:
        copies = tree_map(lambda tensor: tensor.expand(draws, *tensor.shape), image)
        return functional_call(step, {f"module.{name}": value for name, value in values.items()}, (copies,))

    values = {name: parameter.detach() for name, parameter in parameters.items()}
    images = len(tree_leaves(batch)[0])
    if not images:
        empty = {name: value.new_zeros((0, *value.shape)) for name, value in values.items()}
        return empty, torch.zeros(0, device=tree_leaves(batch)[0].device)
    return vmap(grad_and_value(loss), in_dims=(None, 0), randomness="different")(values, batch)


def _chunks(batch: Any) -> list[Any]:
    """Splits the batch into parts of CHUNK images; an empty batch is one empty part."""
    leaves, tree = tree_flatten(batch)
    return [
        tree_unflatten(list(parts), tree) for parts in zip(*(t.split(CHUNK) for t in leaves), strict=True)
    ]
