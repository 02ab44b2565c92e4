"""Sections of a configuration whose optional keys are left out of its dump."""

from typing import Any, ClassVar

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer


class Sparse(BaseModel):
    """A section with optional keys: where one has its default, it is in no dump, and in no cell's id.

    Attributes:
        always: optional keys that are in every dump all the same.
    """

    always: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields.items()
        optional = {n: f.default for n, f in fields if not f.is_required() and n not in self.always}
        left_out = {name for name, default in optional.items() if getattr(self, name) == default}
        return {key: value for key, value in dump(self).items() if key not in left_out}
