"""What a configuration that may come from elsewhere may call: a list of names for each place."""

import inspect
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

from hydra.utils import get_object

from fedlight.federation.federation_config import TRAINER_ARGUMENTS, TrainerConfig
from fedlight.runtime.errors import BadInput


def _named(prefix: str, names: Iterable[str]) -> frozenset[str]:
    return frozenset(f"{prefix}.{name}" for name in names)


TARGETS: Mapping[str, frozenset[str]] = {
    "data.source": _named(
        "fedlight.data", ("celeba.load", "cifar10.load", "digits.load", "fmnist.load", "image_folder.load")
    ),
    "partition.deal": _named("fedlight.data.partition", ("iid", "label_skew", "quantity_skew", "shards")),
    "model.unet": frozenset(
        {"fedlight.diffusion.unet.ConvNextUNet", "diffusers.UNet2DModel", "diffusers.UNet2DConditionModel"}
    ),
    "model.schedule": _named(
        "diffusers",
        (
            "DDIMScheduler",
            "DDPMScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "PNDMScheduler",
            "UniPCMultistepScheduler",
        ),
    ),
    "optimizer": _named(
        "torch.optim",
        (
            "ASGD",
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adam",
            "AdamW",
            "Adamax",
            "LBFGS",
            "Muon",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "SGD",
        ),
    ),
    "algorithm": _named(
        "fedlight.federation.algorithms",
        (
            "fedadam.FedAdam",
            "fedavg.FedAvg",
            "fedavgm.FedAvgM",
            "fednova.FedNova",
            "fedprox.FedProx",
            "fedyogi.FedYogi",
            "localadam.LocalAdam",
            "scaffold.Scaffold",
        ),
    ),
    "transport": _named(
        "fedlight.federation.transport",
        ("dask.Dask", "flower.Flower", "inline.Inline", "processes.Processes"),
    ),
    "logger": _named("fedlight.loggers.metrics", ("csv_logger", "wandb_logger")),
}
"""Dotted key of the configuration: what the `_target_` in it may be."""
STAGE = re.compile(r"transform\.(up|down)\.\d+")
STAGES = _named(
    "fedlight.federation.transforms",
    (
        "huffman.Huffman",
        "lowrank.LowRank",
        "quantisation.Quantisation",
        "rounding.Rounding",
        "sign.Sign",
        "topk.TopK",
    ),
)
"""What each item of the lists of a transform may be."""

NO_ARGUMENTS = {"_target_", "name"}
RATE = {"warmup", "decay"}  # keys of the optimizer that are no arguments of its class


def check_targets(config: dict[str, Any]) -> None:
    """Checks all that a configuration would call, at any depth, before anything of it is made.

    A `_target_` is allowed where TARGETS or STAGES list it, letter by letter, with arguments that it takes
    and that are plain values. Nothing else is imported.

    Raises:
        BadInput: something else would be called; the message names it.
    """
    _check(config, "")
    trainer = config.get("trainer")
    for name in trainer if isinstance(trainer, dict) else ():
        if name not in TrainerConfig.model_fields.keys() | TRAINER_ARGUMENTS:
            raise BadInput(f"trainer.{name} is not among the listed arguments of Lightning's Trainer")


def _check(node: Any, key: str) -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            _check_target(node["_target_"], key)
        for name, value in node.items():
            inner = f"{key}.{name}".lstrip(".")
            if not isinstance(name, str) or "${" in name:
                raise BadInput(f"{inner} would be computed, or is no text")
            _check(value, inner)
        if node.get("_target_") is not None:
            _check_arguments(node, key)
    elif isinstance(node, list):
        for position, value in enumerate(node):
            _check(value, f"{key}.{position}".lstrip("."))
    elif isinstance(node, str):
        if "${" in node:
            raise BadInput(f"{key} would be computed from '{node}'")
    elif not isinstance(node, NoneType | bool | int | float):
        raise BadInput(f"{key} holds {type(node).__name__}, which is no plain value")


def _check_target(target: Any, key: str) -> None:
    listed = STAGES if STAGE.fullmatch(key) else TARGETS.get(key, frozenset())
    if key == "logger" and target is None:
        return
    if not isinstance(target, str) or target not in listed:
        raise BadInput(f"{key}._target_".lstrip(".") + f" would run {target}")


def _check_arguments(node: dict[str, Any], key: str) -> None:
    """Checks the arguments of a listed target, which is imported for it."""
    target = node["_target_"]
    if target.endswith(".Dask") and node.get("address") is not None:
        raise BadInput(f"{key}.address is a scheduler that could run any code here")
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except ImportError:  # not installed here, so that it cannot be called either
        return
    takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = takes | NO_ARGUMENTS | (RATE if key == "optimizer" else set())
    if unknown := sorted(set(node) - known):
        raise BadInput(f"{key}.{unknown[0]} is no argument of {target}")
