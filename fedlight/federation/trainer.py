"""The Lightning Trainer of a client's local update, from the section `trainer` of the configuration."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities import registry
from lightning.fabric.utilities.warnings import disable_possible_user_warnings
from lightning.pytorch.plugins.environments import LightningEnvironment

from fedlight.federation.federation_config import TRAINER_ARGUMENTS, TrainerConfig
from fedlight.runtime.errors import BadInput
from fedlight.runtime.machine import CORES, best_precision

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
disable_possible_user_warnings()
warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
registry.entry_points = cache(registry.entry_points)  # type: ignore[assignment]  # each Trainer looks: 15 ms
os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # lightning sets it: each step looks for NVML, 0.3 ms


def make_trainer_factory(
    config: TrainerConfig, epochs: int, accelerator: str | None = None
) -> Callable[..., Trainer]:
    """Makes the Trainer of one local update; only TRAINER_ARGUMENTS can be set by the user.

    Args:
        config: the section `trainer`.
        epochs: E, of a local update.
        accelerator: in place of the configured one.

    Returns:
        A function that makes a fresh Trainer from its `callbacks`.

    Raises:
        BadInput: the section sets another argument of Lightning's Trainer.
    """
    if unknown := sorted((config.model_extra or {}).keys() - TRAINER_ARGUMENTS):
        raise BadInput(
            f"trainer.{unknown[0]} cannot be set: of the arguments of lightning.Trainer a client takes "
            f"{', '.join(sorted(TRAINER_ARGUMENTS))}"
        )
    for name in [name for name in os.environ if name.startswith("PL_TRAINER_")]:
        del os.environ[name]  # Lightning's defaults of arguments, such as num_nodes, which no cell's id has
    arguments = config.model_dump(exclude={"threads", "compile", "workers", "fuse"})
    arguments["accelerator"] = accelerator or config.accelerator
    arguments["precision"] = choose_precision(config, accelerator)
    fixed: dict[str, Any] = {
        "max_epochs": epochs,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [LightningEnvironment()],  # a client's Trainer joins no SLURM world
    }
    return partial(Trainer, **arguments, **fixed)


def choose_precision(config: TrainerConfig, accelerator: str | None = None) -> str:
    """The precision of a Trainer, as Lightning names it; on a CPU Lightning takes 16-mixed as bf16-mixed."""
    if config.precision == "auto":
        return best_precision(accelerator or config.accelerator)
    return config.precision


def max_workers(config: TrainerConfig, device: torch.device) -> int:
    """How many processes may train clients at once; the result does not depend on it.

    Args:
        config: the section `trainer`; `workers=null` fills a CPU's cores, and leaves a GPU to one process.
        device: that the clients train on.
    """
    fitting = CORES // (config.threads or CORES) if device.type == "cpu" else 1
    return config.workers or max(1, fitting)


def limit_batches(config: TrainerConfig, batches: int) -> int:
    """How many of a client's batches the Trainer takes in an epoch (`trainer.limit_train_batches`).

    Args:
        config: the section `trainer`.
        batches: of all images of the client.
    """
    limit = (config.model_extra or {}).get("limit_train_batches")
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def count_batches(config: TrainerConfig, epochs: int, batches: int) -> int:
    """How many batches the Trainer takes in a local update; `trainer.max_steps` may end it early.

    Args:
        config: the section `trainer`.
        epochs: E, of a local update.
        batches: of all images of the client; 0 for a client on another machine.
    """
    limited, together = limit_batches(config, batches), _accumulated(config)
    if not limited:
        return 0
    whole, rest = divmod(count_steps(config, epochs, batches), -(-limited // together))
    return whole * limited + rest * together


def count_steps(config: TrainerConfig, epochs: int, batches: int) -> int:
    """How many optimizer steps a local update has; its arguments are those of `count_batches`.

    Accumulated gradients are stepped with after the last batch of an epoch as well.
    """
    steps = epochs * -(-limit_batches(config, batches) // _accumulated(config))
    most: int = (config.model_extra or {}).get("max_steps", -1)
    return steps if most == -1 else min(steps, most)


def _accumulated(config: TrainerConfig) -> int:
    """How many batches are accumulated for one optimizer step."""
    accumulated: int = (config.model_extra or {}).get("accumulate_grad_batches", 1)
    return accumulated


def check_steps(config: TrainerConfig, batch_size: int, sizes: Sequence[int]) -> None:
    """Checks that each client takes a step.

    Args:
        config: the section `trainer`.
        batch_size: images in a batch.
        sizes: images of each client; 0 where they are on another machine.

    Raises:
        BadInput: a client would take no step.
    """
    values = config.model_extra or {}
    for name in ("accumulate_grad_batches", "max_steps"):
        value = values.get(name, 1)
        unlimited = name == "max_steps" and value == -1
        if not (type(value) is int and value > 0) and not unlimited:
            raise BadInput(f"trainer.{name} must be a whole number of at least 1, got {value}")
    limit = values.get("limit_train_batches")
    if limit is None or (type(limit) is int and limit > 0):
        return
    if type(limit) is not float or not 0 < limit <= 1:
        raise BadInput(
            "trainer.limit_train_batches must be a share above 0 and up to 1.0, or a number of batches, got "
            f"{limit}"
        )
    fewest = min((-(-size // batch_size) for size in sizes if size), default=None)
    if fewest is not None and limit_batches(config, fewest) < 1:
        raise BadInput(
            f"trainer.limit_train_batches={limit} leaves no batch to a client that has {fewest} an epoch: it "
            f"must be at least {math.ceil(1000 / fewest) / 1000}"
        )
