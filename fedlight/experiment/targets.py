"""The code that an untrusted configuration may call: a list of names for each key."""

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

from hydra.utils import get_object

from fedlight.federation.federation_config import TRAINER_ARGUMENTS, TrainerConfig
from fedlight.loggers.several import split_loggers
from fedlight.runtime.errors import BadInput


def _named(prefix: str, names: Iterable[str]) -> frozenset[str]:
    return frozenset(f"{prefix}.{name}" for name in names)


TARGETS: Mapping[str, frozenset[str]] = {
    "data.source": _named(
        "fedlight.data",
        (
            "celeba.load",
            "cifar10.load",
            "digits.load",
            "fmnist.load",
            "huggingface.load",
            "image_folder.load",
        ),
    ),
    "partition.deal": _named(
        "fedlight.data.partition", ("iid", "label_skew", "natural", "quantity_skew", "shards")
    ),
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
            "flexlora.FlexLoRA",
            "localadam.LocalAdam",
            "scaffold.Scaffold",
        ),
    ),
    "transport": _named(
        "fedlight.federation.transport",
        ("dask.Dask", "flower.Flower", "inline.Inline", "processes.Processes"),
    ),
    "logger": _named(
        "fedlight.loggers",
        (
            "metrics.csv_logger",
            "metrics.wandb_logger",
            "mlflow_runs.mlflow_logger",
            "tensorboard_runs.tensorboard_logger",
        ),
    ),
}
"""Dotted key of the configuration -> the permitted values of `_target_` there."""
LOGGER = re.compile(r"logger\.\w+")  # one of several loggers
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
"""The permitted values of `_target_` of a transform's stages."""

NOT_PASSED = {"_target_", "name"}  # keys that are not passed to the target
NOT_PASSED_TO_OPTIMIZER = {"warmup", "decay"}


def check_targets(config: dict[str, Any]) -> None:
    """Checks everything that a configuration would call, at any depth, before any of it is made.

    A `_target_` is permitted where TARGETS or STAGES list it literally, with plain values for arguments that
    it takes. Nothing else is imported.

    Raises:
        BadInput: the configuration would call something else, or holds a value that is not plain.
    """
    _check_node(config, "")
    trainer = config.get("trainer")
    permitted = TrainerConfig.model_fields.keys() | TRAINER_ARGUMENTS
    for name in trainer if isinstance(trainer, dict) else ():
        if name not in permitted:
            raise BadInput(f"trainer.{name} is not permitted; permitted are {', '.join(sorted(permitted))}")


def check_tracking(config: dict[str, Any]) -> None:
    """Checks where the loggers of a received configuration would send what they log.

    Raises:
        BadInput: to another tracking server than that of this user.
    """
    for key, node in split_loggers(config.get("logger") or {}).items():
        address = node.get("tracking_uri")
        if address is not None and address != os.environ.get("MLFLOW_TRACKING_URI"):
            raise BadInput(
                f"{key}.tracking_uri={address} would send what is logged there; set MLFLOW_TRACKING_URI to "
                "it, or logger=none"
            )


def _check_node(node: Any, key: str) -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            _check_target(node["_target_"], key)
        for name, value in node.items():
            inner = f"{key}.{name}".lstrip(".")
            if not isinstance(name, str) or "${" in name:
                raise BadInput(f"{inner} is not a plain key: keys must be text without interpolations")
            _check_node(value, inner)
        if node.get("_target_") is not None:
            _check_arguments(node, key)
    elif isinstance(node, list):
        for position, value in enumerate(node):
            _check_node(value, f"{key}.{position}".lstrip("."))
    elif isinstance(node, str):
        if "${" in node:
            raise BadInput(f"{key} holds the interpolation '{node}': only plain values are permitted")
    elif not isinstance(node, NoneType | bool | int | float):
        raise BadInput(
            f"{key} holds a value of type {type(node).__name__}: only text, numbers, true, false, null, "
            "lists and mappings are permitted"
        )


def _check_target(target: Any, key: str) -> None:
    place = "logger" if LOGGER.fullmatch(key) else key
    permitted = STAGES if STAGE.fullmatch(key) else TARGETS.get(place, frozenset())
    if key == "logger" and target is None:
        return
    if not isinstance(target, str) or target not in permitted:
        instead = f"permitted are {', '.join(sorted(permitted))}" if permitted else "no target is permitted"
        raise BadInput(f"{key}._target_".lstrip(".") + f" would run {target}, and {instead}")


def _check_arguments(node: dict[str, Any], key: str) -> None:
    """Checks the arguments of a permitted target, which is imported for it."""
    target = node["_target_"]
    if target.endswith(".Dask") and node.get("address") is not None:
        raise BadInput(f"{key}.address names a Dask scheduler, which could run any code on this machine")
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except ImportError:  # not installed, so that it cannot be called either
        return
    arguments = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if key == "logger":
        node = split_loggers(node)[key]  # the further ones are checked by themselves
    permitted = arguments | NOT_PASSED | (NOT_PASSED_TO_OPTIMIZER if key == "optimizer" else set())
    if unknown := sorted(set(node) - permitted):
        raise BadInput(f"{key}.{unknown[0]} is not an argument of {target}")
