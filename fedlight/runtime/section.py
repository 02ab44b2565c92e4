"""The base classes of the sections of a configuration, and the types that they share."""

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
FilePath: TypeAlias = Annotated[str, Field(min_length=1)]
"""The path of a file or a folder."""
Target: TypeAlias = dict[str, Any]
"""A node with a `_target_`, instantiated by Hydra."""


class Section(BaseModel):
    """A part of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OpenSection(BaseModel):
    """A part of the configuration whose further keys are arguments of the class that it names."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, populate_by_name=True)


class Sparse(BaseModel):
    """A section with optional keys: a key that has its default is in no dump, and so in no cell's id.

    Attributes:
        always: optional keys that every dump contains nevertheless.
    """

    always: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields.items()
        optional = {n: f.default for n, f in fields if not f.is_required() and n not in self.always}
        omitted = {name for name, default in optional.items() if getattr(self, name) == default}
        return {key: value for key, value in dump(self).items() if key not in omitted}
