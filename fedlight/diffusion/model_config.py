"""The sections `model` and `optimizer` of the configuration."""

from typing import Annotated, Literal

from pydantic import Field

from fedlight.runtime.section import OpenSection, Section, Sparse, Target


class ModelConfig(Section, Sparse):
    """The client model and its slice map."""

    name: str
    unet: Target | None = None
    schedule: Target | None = None
    loss: str
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    exchange_ema: bool
    slices: Annotated[dict[str, list[str]], Field(min_length=1)]
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    conditional: bool = False
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    label_slice: str | None = None


class OptimizerConfig(OpenSection, Sparse):
    """The optimizer, made anew at each local update, and its rate over rounds; more keys go to its class."""

    target: Annotated[str, Field(alias="_target_")]
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup: Annotated[int, Field(ge=0)] = 0
    decay: Literal["cosine"] | None = None
