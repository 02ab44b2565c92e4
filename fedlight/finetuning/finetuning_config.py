"""The section `finetuning` of the configuration."""

from typing import Annotated, Literal

from pydantic import Field

from fedlight.runtime.section import PositiveInt, Section, Sparse

DEFAULT_RANK = 4  # of adapters


class FinetuningConfig(Section, Sparse):
    """The pretrained model that all participants have, and what of it is trained."""

    name: Literal["full", "lora"]
    pretrained: str | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    rank: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    train: Literal["both", "b"] | None = None
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    prompt: str | None = None

    @property
    def client_ranks(self) -> tuple[int, ...]:
        """The rank of each client's adapters; empty where all have the same."""
        return tuple(self.rank) if isinstance(self.rank, list) else ()

    @property
    def largest_rank(self) -> int:
        """The rank of the server's adapters."""
        return max(self.client_ranks) if isinstance(self.rank, list) else self.rank or DEFAULT_RANK
