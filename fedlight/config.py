"""The schema of a cell's configuration: every key, its type and what is allowed."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from fedlight.federation.method import Method
from fedlight.runtime.errors import BadInput, Held, first_cause, plain_line
from fedlight.runtime.files import explain
from fedlight.runtime.secret import masked, redacted
from fedlight.runtime.sparse import Sparse

Whole = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
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
    cache: str | None = None
    attributes: list[str] | None = None
    skip_unreadable: bool = False
    source: Target

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
    cache: str
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class CellConfig(Section):
    """One cell: one federation from start to result."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    output: Annotated[str, Field(min_length=1)]
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

    @field_validator("transform", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """`transform=none` is an empty group, and no group is chosen."""
        return value or None

    def plain(self) -> dict[str, Any]:
        """The configuration as JSON knows it; a group that is not chosen is absent."""
        dumped = self.model_dump(mode="json", by_alias=True)
        return {key: value for key, value in dumped.items() if value is not None}


def validate(config: DictConfig) -> CellConfig:
    """The configuration, checked.

    Raises:
        BadInput: a key is missing, unknown, of the wrong type or out of its range.
    """
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    try:
        return CellConfig.model_validate(resolved)
    except ValidationError as error:
        raise BadInput("; ".join(_explain(e) for e in error.errors())) from error


def describe(error: BaseException) -> str:
    """What is wrong, in one line, and the key that was meant where one is misspelled."""
    error = first_cause(error)
    told = explain(error) if type(error) is not Held and isinstance(error, OSError) else str(error)
    message = redacted(plain_line(told.split("Config search path")[0])) or type(error).__name__
    unknown = re.search(r"is not in struct full_key: (\S+)", message)
    return _unknown(unknown[1]) if unknown else message


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "extra_forbidden":
        return _unknown(key)
    if error["type"] == "missing":
        return f"{key}: {message}"
    return f"{key}: {message}, got {masked(error['input'], key)!r}"


def _unknown(key: str) -> str:
    known = list(_keys(CellConfig))
    if key in known:
        return f"{key} has no value in the configuration that it could replace; ++{key}=... sets it"
    close = get_close_matches(key, known, n=1)
    return f"{key} is not a key of the configuration" + (f"; did you mean {close[0]}?" if close else "")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of the schema."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
