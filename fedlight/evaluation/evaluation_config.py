"""The section `evaluation` of the configuration."""

from typing import Annotated, Literal

from pydantic import Field

from fedlight.runtime.section import FilePath, PositiveInt, Section, Sparse


class EvaluationConfig(Section, Sparse):
    """How images are sampled from the trained models, and scored."""

    every: PositiveInt | None
    samples: Annotated[int, Field(ge=0)]
    sampler: str
    steps: PositiveInt
    grid: Annotated[int, Field(ge=0)]
    clients: Literal["all"] | PositiveInt
    extractor: Literal["classifier", "inception", "dinov2", "clip"]
    reference: Literal["test", "train"]
    memorisation: bool
    weights: str | None
    weights_name: str | None
    cache: FilePath
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    bootstrap: Annotated[int, Field(ge=2)] | None = None
    downstream: bool = False
    background: bool = False
