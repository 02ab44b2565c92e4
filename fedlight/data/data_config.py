"""The sections `data` and `partition` of the configuration."""

import hashlib
import json
from math import inf
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from fedlight.runtime.section import FilePath, PositiveInt, Section, Sparse, Target


class DataConfig(Section, Sparse):
    """The data set: its facts, how it is loaded and batched."""

    always = frozenset({"root", "cache", "attributes"})

    name: Annotated[str, Field(pattern=r"^[^/]+$")]  # a part of file names in the cache
    image_size: PositiveInt
    channels: PositiveInt
    batch_size: PositiveInt
    limit: PositiveInt | None
    root: str | None = None
    cache: FilePath | None = None
    attributes: list[str] | None = None
    skip_unreadable: bool = False
    classes: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    only: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    range: Literal["type", "measured"] | list[float] = "type"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = "label"
    client_column: str | None = None
    source: Target

    @field_validator("classes", "only", mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        """Turns names such as 0 and 12, which are whole numbers on the command line, into text."""
        if not isinstance(value, list):
            return value
        names = [str(name) if type(name) is int else name for name in value]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"a class is named twice: {duplicates[0]}")
        return names

    @field_validator("range", mode="before")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        if value in ("type", "measured"):
            return value
        numbers = isinstance(value, list) and [type(number) in (int, float) for number in value]
        if numbers != [True, True] or not -inf < value[0] < value[1] < inf:
            raise PydanticCustomError(
                "range", "must be type, measured, or two numbers such as [0,4095], the smaller one first"
            )
        return [float(number) for number in value]

    @property
    def set_name(self) -> str:
        """The name of the data set; of some of its classes, with a hash of their names."""
        if self.only is None:
            return self.name
        return f"{self.name}-{hashlib.sha256(json.dumps(self.only).encode()).hexdigest()[:8]}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.image_size, self.image_size


class PartitionConfig(Section):
    """How the training images are assigned to the clients."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    beta: Annotated[float, Field(gt=0)] | None = None
    classes: PositiveInt | None = None
    deal: Target
