"""The schema of a cell's configuration: every key, its type and what is allowed."""

import os
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from fedlight.config_errors import OPTIONAL_GROUPS, describe_invalid
from fedlight.data.data_config import DataConfig, PartitionConfig
from fedlight.diffusion.model_config import ModelConfig, OptimizerConfig
from fedlight.evaluation.evaluation_config import EvaluationConfig
from fedlight.federation.federation_config import (
    AggregationConfig,
    ExtensionConfig,
    FederationConfig,
    PrivacyConfig,
    TrainerConfig,
    TransformConfig,
)
from fedlight.federation.method import Method
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.loggers.several import split_loggers
from fedlight.runtime.errors import BadInput
from fedlight.runtime.section import FilePath, PositiveInt, Section, Target


class EarlyStoppingConfig(Section):
    """When a cell ends before its last round."""

    monitor: Literal["fid", "train_loss"]
    patience: PositiveInt
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CellConfig(Section):
    """One cell: one federation from start to result."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    output: FilePath
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    method: Method
    clients: PositiveInt
    rounds: Annotated[int, Field(ge=0)]
    epochs: PositiveInt
    fraction: Annotated[float, Field(gt=0, le=1)]
    data: DataConfig
    partition: PartitionConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    federation: FederationConfig
    evaluation: EvaluationConfig
    logger: Target
    algorithm: ExtensionConfig | None = None
    transform: TransformConfig | None = None
    transport: ExtensionConfig | None = None
    privacy: PrivacyConfig | None = None
    aggregation: AggregationConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    finetuning: FinetuningConfig | None = None

    @field_validator("logger")
    @classmethod
    def _named(cls, value: Target) -> Target:
        """Each logger's `_target_` is a name."""
        for key, node in split_loggers(value).items():
            if not isinstance(node["_target_"], str):
                raise PydanticCustomError(
                    "logger_target",
                    "the _target_ of {key} must be the name of a class or function",
                    {"key": key},
                )
        return value

    @field_validator(*OPTIONAL_GROUPS, mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """`GROUP=none` is an empty group: the same cell as without the group."""
        return value or None

    def plain(self) -> dict[str, Any]:
        """The configuration as JSON knows it; a group that is not chosen is absent."""
        dumped = self.model_dump(mode="json", by_alias=True)
        return {key: value for key, value in dumped.items() if value is not None}


def validate(config: DictConfig) -> CellConfig:
    """The configuration, checked; in its paths, `~` is the home folder.

    Raises:
        BadInput: a key is missing, unknown, of the wrong type or out of its range.
    """
    config = config.copy()
    for key in PATH_KEYS:
        path = OmegaConf.select(config, key)
        if isinstance(path, str):
            OmegaConf.update(config, key, _expand(key, path))
    resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    try:
        return CellConfig.model_validate(resolved)
    except ValidationError as error:
        raise BadInput(describe_invalid(error, SCHEMA_KEYS, UNIONS, resolved)) from error


def _expand(key: str, path: str) -> str | None:
    """A path from the home folder, where it begins with `~`; None for an empty one that may be left out."""
    if not path and key in OPTIONAL_PATHS:
        return None
    expanded = os.path.expanduser(path)
    if expanded.split("/")[0] == "~":
        raise BadInput(f"{key}: there is no home folder that ~ could stand for, got {path!r}; set HOME")
    return expanded


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of the schema and their types."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field.annotation
        for type_ in _alternatives(field.annotation):
            if isinstance(type_, type) and issubclass(type_, BaseModel):
                yield from _keys(type_, f"{prefix}{name}.")


def _alternatives(annotation: Any) -> set[Any]:
    """The types of a union, or the one type; `Annotated` is looked through."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*(_alternatives(inner) for inner in get_args(annotation)))
    return {annotation}


def _keys_of_type(type_: type) -> frozenset[str]:
    return frozenset(key for key, annotation in _keys(CellConfig) if type_ in _alternatives(annotation))


OPTIONAL_PATHS = ("data.root", "data.path", "evaluation.weights", "finetuning.pretrained")
PATH_KEYS = ("output", "data.cache", "evaluation.cache", *OPTIONAL_PATHS)
UNIONS = {
    key: annotation
    for key, annotation in _keys(CellConfig)
    if len(_alternatives(annotation) - {type(None)}) > 1
}
"""Keys that take values of several types, and the types."""
SCHEMA_KEYS = frozenset(key for key, _ in _keys(CellConfig))
TEXT_KEYS = _keys_of_type(str) | {
    f"logger.{key}" for key in ("project", "entity", "wandb.project", "wandb.entity")
}
"""Keys whose values are text, numbers and truth values among them."""
WHOLE_KEYS = _keys_of_type(int)
"""Keys that take whole numbers."""
