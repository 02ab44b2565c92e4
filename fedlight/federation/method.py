"""A federation method as data: which slices travel, which stay, who reports what."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedlight.runtime.errors import BadInput
from fedlight.runtime.section import Sparse


class Split(BaseModel):
    """How the uplink slices are dealt to random pairs of participants (FedDiffuse, USPLIT).

    Attributes:
        either: one of the pair reports the first of these slices, the other the second.
        coin: a fair coin says which of the two reports this slice as well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    either: tuple[str, str]
    coin: str


class Method(Sparse):
    """What crosses between server and clients, and what is evaluated (FedDiffuse, section 4).

    Attributes:
        name: as shown in tables.
        downlink: slices that a client receives each round after its first contact, at which it
            receives the whole model; the others stay private to it and carry over.
        uplink: slices that a client reports.
        split: how the uplink is dealt to pairs; null where every participant reports all of it.
        evaluate: the global model (`global`) or every client's own (`clients`).
        pool: the server holds all data itself and trains alone; nothing crosses.
        keep_optimizer: carry the optimizer's state from one local update to the next.
        warm_start: the first rounds, in which the whole model is exchanged and averaged, as FULL does. A
            client that has not taken part since receives the whole model once more.
        freeze: slices that are not trained after the warm start; they are private then.
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

    def whole_down(self, previous: int) -> bool:
        """Whether a client that last took part in the round `previous`, 0 for never, gets the whole model."""
        return previous <= self.warm_start

    def in_round(self, round_: int, slices: Iterable[str]) -> "Method":
        """What the method is in a round, 1..R, of a model with these slices: FULL in the warm start."""
        if round_ > self.warm_start:
            return self
        whole = tuple(slices)
        return self.model_copy(update={"downlink": whole, "uplink": whole, "split": None, "freeze": ()})

    def resolve(self, slices: Iterable[str]) -> "Method":
        """The same method with `all` spelled out over the slices of a model.

        Raises:
            BadInput: the method names a slice twice, or one that the model does not have.
        """
        known = tuple(slices)
        downlink = known if self.downlink == "all" else self.downlink
        uplink = known if self.uplink == "all" else self.uplink
        dealt = (*self.split.either, self.split.coin) if self.split else ()
        for key, named in (("downlink", downlink), ("uplink", uplink), ("split", dealt)):
            if len(set(named)) < len(named):
                raise BadInput(f"method {self.name}: {key} names a slice twice: {', '.join(named)}")
            for slice_ in named:
                if slice_ not in known:
                    raise BadInput(
                        f"method {self.name}: {key} names the unknown slice {slice_}; "
                        f"the model has {', '.join(known)}"
                    )
        if self.split and set(dealt) != set(uplink):
            raise BadInput(
                f"method {self.name}: split deals {', '.join(dealt)}, which must be the slices of the "
                f"uplink: {', '.join(uplink)}"
            )
        for slice_ in self.freeze:
            if slice_ not in known or slice_ in uplink:
                private = [name for name in known if name not in uplink]
                raise BadInput(
                    f"method {self.name}: freeze names {slice_}, which is no slice that stays private; "
                    f"those are {', '.join(private) or 'none'}"
                )
        return self.model_copy(update={"downlink": downlink, "uplink": uplink})
