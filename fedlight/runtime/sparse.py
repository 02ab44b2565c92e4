"""Sections of the configuration whose dump omits optional keys with default values."""

from typing import Any, ClassVar

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer


class Sparse(BaseModel):
    """A section whose dump, and so a cell's id, omits optional keys that have their default value.

    Attributes:
        always: optional keys that are dumped in any case.
    """

    always: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields.items()
        optional = {n: f.default for n, f in fields if not f.is_required() and n not in self.always}
        left_out = {name for name, default in optional.items() if getattr(self, name) == default}
        return {key: value for key, value in dump(self).items() if key not in left_out}
