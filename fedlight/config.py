"""The schema of a cell's configuration: every key, its type and what is allowed."""

import os
from collections.abc import Iterator
from math import inf
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from fedlight.config_errors import describe_invalid
from fedlight.federation.method import Method
from fedlight.runtime.errors import BadInput
from fedlight.runtime.sparse import Sparse

Whole = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[str, Field(min_length=1)]
"""The path of a file or a folder."""
TRAINER_ARGUMENTS = frozenset(
    {
        "accumulate_grad_batches",
        "benchmark",
        "detect_anomaly",
        "deterministic",
        "gradient_clip_algorithm",
        "gradient_clip_val",
        "limit_train_batches",
        "max_steps",
    }
)
"""What a configuration may add to a client's Trainer. The federation decides others (devices, nodes, epochs,
loggers), and the rest makes a result depend on time, or has no effect on training."""
Target = dict[str, Any]
"""A node with a `_target_`, instantiated by Hydra."""


class Section(BaseModel):
    """A part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataConfig(Section, Sparse):
    """The data set: its facts, how it is loaded and batched."""

    always = frozenset({"root", "cache", "attributes"})

    name: Annotated[str, Field(pattern=r"^[^/]+$")]  # a part of file names in the cache
    image_size: Whole
    channels: Whole
    batch_size: Whole
    limit: Whole | None
    root: str | None = None
    cache: Place | None = None
    attributes: list[str] | None = None
    skip_unreadable: bool = False
    classes: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    range: Literal["type", "measured"] | list[float] = "type"
    source: Target

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Names such as 0 and 12 are whole numbers on the command line."""
        if not isinstance(value, list):
            return value
        names = [str(name) if type(name) is int else name for name in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"a class is named twice: {twice[0]}")
        return names

    @field_validator("range", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if value in ("type", "measured"):
            return value
        numbers = isinstance(value, list) and [type(number) in (int, float) for number in value]
        if numbers != [True, True] or not -inf < value[0] < value[1] < inf:
            raise PydanticCustomError(
                "range", "must be type, measured, or two numbers such as [0,4095], the smaller one first"
            )
        return [float(number) for number in value]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.image_size, self.image_size


class PartitionConfig(Section):
    """How the training images are dealt to the clients."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    beta: Annotated[float, Field(gt=0)] | None = None
    classes: Whole | None = None
    deal: Target


class ModelConfig(Section, Sparse):
    """The client model and its slice map."""

    name: str
    unet: Target
    schedule: Target
    loss: str
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    exchange_ema: bool
    slices: Annotated[dict[str, list[str]], Field(min_length=1)]
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    conditional: bool = False
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    label_slice: str | None = None


class OptimizerConfig(Sparse):
    """The optimizer, made anew at each local update, and its rate over rounds; more keys go to its class."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, populate_by_name=True)

    target: Annotated[str, Field(alias="_target_")]
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup: Annotated[int, Field(ge=0)] = 0
    decay: Literal["cosine"] | None = None


class TrainerConfig(BaseModel):
    """The client's Lightning Trainer; further keys go to it."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    accelerator: str
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    threads: Whole | None
    compile: bool = False
    workers: Whole | None = None


class ExtensionConfig(BaseModel):
    """An algorithm or a transport: a class and its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, populate_by_name=True)

    name: str
    target: Annotated[str, Field(alias="_target_")]


class TransformConfig(Section, Sparse):
    """How what crosses is encoded, stage by stage, and whether the first model crosses at all."""

    name: str
    up: list[Target] = []
    down: list[Target] = []
    seeded_start: bool = False


class PrivacyConfig(Section):
    """What is promised about privacy."""

    name: Literal["client", "example"]
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    clip: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    noise_at: Literal["server", "clients"] | None = None
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    draws: Whole | None = None
    secure_noise: bool = False


class FederationConfig(Section):
    """What goes wrong in a federation."""

    dropout: Probability


class EvaluationConfig(Section, Sparse):
    """How images are sampled from the trained models, and scored."""

    every: Whole | None
    samples: Annotated[int, Field(ge=0)]
    sampler: str
    steps: Whole
    grid: Annotated[int, Field(ge=0)]
    clients: Literal["all"] | Whole
    extractor: Literal["classifier", "inception"]
    reference: Literal["test", "train"]
    memorisation: bool
    weights: str | None
    weights_name: str | None
    cache: Place
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class CellConfig(Section):
    """One cell: one federation from start to result."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    output: Place
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    method: Method
    clients: Whole
    rounds: Annotated[int, Field(ge=0)]
    epochs: Whole
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

    @field_validator("algorithm", "transform", "transport", "privacy", mode="before")
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
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    try:
        return CellConfig.model_validate(resolved)
    except ValidationError as error:
        raise BadInput(describe_invalid(error, SCHEMA_KEYS)) from error


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


OPTIONAL_PATHS = ("data.root", "evaluation.weights")
PATH_KEYS = ("output", "data.cache", "evaluation.cache", *OPTIONAL_PATHS)
SCHEMA_KEYS = frozenset(key for key, _ in _keys(CellConfig))
TEXT_KEYS = _keys_of_type(str) | {"logger.project", "logger.entity"}
"""Keys whose values are text, numbers and truth values among them."""
WHOLE_KEYS = _keys_of_type(int)
"""Keys that take whole numbers."""
