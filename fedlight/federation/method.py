"""A federation method as data: which slices are sent, which stay private, and who reports them."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedlight.runtime.errors import BadInput
from fedlight.runtime.section import Sparse


class Split(BaseModel):
    """Assignment of the uplink slices to random pairs of participants (FedDiffuse, USPLIT).

    Attributes:
        either: one of the pair reports the first of these slices, the other the second.
        coin: a fair coin decides which of the two also reports this slice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    either: tuple[str, str]
    coin: str


class Method(Sparse):
    """The slices that server and clients exchange, and the models that are evaluated (FedDiffuse, section 4).

    Attributes:
        name: as shown in tables.
        downlink: slices that a client receives in each round after its first contact, at which it receives
            all slices; the others are private to it and persist from round to round.
        uplink: slices that a client reports.
        split: assignment of the uplink to pairs; null where every participant reports all of it.
        evaluate: the global model (`global`) or every client's own (`clients`).
        pool: the server has all data and trains alone; nothing is exchanged.
        keep_optimizer: keep the optimizer's state from one local update to the next.
        warm_start: number of first rounds in which all slices are exchanged and averaged, as in FULL. A
            client that has not taken part since then receives all slices once more.
        freeze: private slices that are not trained after the warm start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    always = frozenset({"split", "pool", "keep_optimizer"})

    name: str
    downlink: Literal["all"] | tuple[str, ...]
    uplink: Literal["all"] | tuple[str, ...]
    split: Split | None = None
    evaluate: Literal["global", "clients"]
    pool: bool = False
    keep_optimizer: bool = False
    warm_start: Annotated[int, Field(ge=0)] = 0
    freeze: tuple[str, ...] = ()

    def sends_all(self, previous: int) -> bool:
        """Whether a client that last took part in the round `previous`, 0 for never, receives all slices."""
        return previous <= self.warm_start

    def in_round(self, round_: int, slices: Iterable[str]) -> "Method":
        """The method in a round, 1..R, of a model with these slices: FULL in the warm start."""
        if round_ > self.warm_start:
            return self
        everything = tuple(slices)
        return self.model_copy(
            update={"downlink": everything, "uplink": everything, "split": None, "freeze": ()}
        )

    def resolve(self, slices: Iterable[str]) -> "Method":
        """The same method with `all` replaced by the slices of a model.

        Raises:
            BadInput: the method names a slice twice, or one that the model does not have.
        """
        known = tuple(slices)
        downlink = known if self.downlink == "all" else self.downlink
        uplink = known if self.uplink == "all" else self.uplink
        assigned = (*self.split.either, self.split.coin) if self.split else ()
        for key, named in (("downlink", downlink), ("uplink", uplink), ("split", assigned)):
            if len(set(named)) < len(named):
                raise BadInput(f"method {self.name}: {key} names a slice twice: {', '.join(named)}")
            for slice_ in named:
                if slice_ not in known:
                    raise BadInput(
                        f"method {self.name}: {key} names the unknown slice {slice_}; "
                        f"the model has {', '.join(known)}"
                    )
        if self.split and set(assigned) != set(uplink):
            raise BadInput(
                f"method {self.name}: split assigns {', '.join(assigned)}; it must assign the slices of the "
                f"uplink, {', '.join(uplink)}"
            )
        for slice_ in self.freeze:
            if slice_ not in known or slice_ in uplink:
                private = [name for name in known if name not in uplink]
                raise BadInput(
                    f"method {self.name}: freeze names {slice_}, which is not a private slice; the private "
                    f"slices are {', '.join(private) or 'none'}"
                )
        return self.model_copy(update={"downlink": downlink, "uplink": uplink})
