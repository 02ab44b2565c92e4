"""The section `finetuning` of the configuration."""

from typing import Annotated, Literal

from pydantic import Field

from fedlight.runtime.section import PositiveInt, Section, Sparse


class FinetuningConfig(Section, Sparse):
    """The pretrained model that all participants have, and what of it is trained."""

    name: Literal["full", "lora"]
    pretrained: str | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    rank: PositiveInt | None = None
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    train: Literal["both", "b"] | None = None
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    prompt: str | None = None
