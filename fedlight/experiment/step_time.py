"""The time of an optimizer step of a cell on this machine, measured."""

import time
from typing import Any

from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.optim import Optimizer

from fedlight.diffusion.depthwise import use_stacked_layers
from fedlight.experiment.parts import CellParts
from fedlight.federation.stack import RandomState, Stack

STEP_SECTIONS = {"model", "data", "optimizer", "trainer", "finetuning"}
"""The sections of the configuration that decide the cost of a step."""

REPEATED_SECONDS = 1.0  # a step is repeated until so much time has passed
MOST_STEPS = 10

_step_seconds_cache: dict[str, float] = {}  # the settings that decide it -> seconds of one optimizer step


def take_step(precision: Precision, module: Any, optimizer: Optimizer, batch: Any) -> Tensor:
    """Takes one optimizer step as a Trainer does, without its callbacks; returns the loss.

    Args:
        precision: of the Trainer.
        module: a client's model, or several in one `Stack`.
        optimizer: of the module.
        batch: for each client in the stack, or one.
    """
    optimizer.zero_grad()
    with precision.train_step_context():
        output = module.training_step(batch, 0)
    loss: Tensor = output["loss"] if isinstance(output, dict) else output
    loss.backward()
    optimizer.step()
    return loss


def alone_seconds(parts: CellParts) -> float:
    """The time of one optimizer step of one client, in seconds."""
    use_stacked_layers(parts.model, False)
    return _step_seconds(_step_settings(parts), parts, parts.largest_batch)


def fused_seconds(parts: CellParts, fuse: int) -> float:
    """The time of one optimizer step of `fuse` clients in one computation, in seconds."""
    use_stacked_layers(parts.model)
    return _step_seconds(f"{_step_settings(parts)} {fuse}", parts, parts.largest_batch, fuse)


def _step_settings(parts: CellParts) -> str:
    return parts.config.model_dump_json(include=STEP_SECTIONS)


def _step_seconds(settings: str, parts: CellParts, batch: int, fuse: int = 1) -> float:
    """The least time of several optimizer steps of `fuse` clients, measured once for each `settings`.

    Other processes only add time. The first step, which allocates what later ones reuse, does not count.
    """
    if settings not in _step_seconds_cache:
        module: Any = parts.model.to(parts.device)
        images = parts.first_batch(batch)
        if fuse > 1:
            module, images = Stack(module, fuse), [images] * fuse
            module.begin([RandomState(0, parts.device) for _ in range(fuse)])
        optimizer = module.configure_optimizers()
        precision = parts.make_trainer().precision_plugin
        times: list[float] = []
        while len(times) < 2 or (sum(times) < REPEATED_SECONDS and len(times) <= MOST_STEPS):
            started = time.perf_counter()
            take_step(precision, module, optimizer, images).item()  # waits for the device
            times.append(time.perf_counter() - started)
        _step_seconds_cache[settings] = min(times[1:])
    return _step_seconds_cache[settings]
