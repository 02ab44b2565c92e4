"""What a transport is: it carries broadcasts to clients and brings their updates."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update
from fedlight.federation.site import Site


class Transport(Protocol):
    """The only way between server and clients."""

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        """Hands each broadcast to its client and yields the updates, in any sequence."""

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        """Asks clients to evaluate their own models; yields their answers, in any sequence.

        A client in an institution of its own may not answer.
        """


@dataclass(frozen=True)
class TransportContext:
    """What a cell offers to its transport.

    Attributes:
        here: the site of this process.
        make_site: makes the site of another process of this machine; can be pickled.
        cohort: clients in a round.
        room: processes that the machine has room for.
        done: called after each local update that another process did.
        check: called now and then while waiting; ends the cell by an exception where it is to end.
        ending: what a transport enters here ends with the cell.
        admit: raises Damaged for an update that does not fit the global model or the slices that were asked
            for; only of use for clients whom nobody can vouch for.
        admit_scores: raises Damaged for scores of drawn images that the cell's evaluator does not give.
        forget: notes that a client has lost what it kept, so that it is met anew.
        unsent: notes that a broadcast of this round was not sent to its client.
    """

    here: Site
    make_site: Callable[[], Site]
    cohort: int
    room: int
    done: Callable[[], None]
    check: Callable[[], None]
    ending: ExitStack = field(default_factory=ExitStack)
    admit: Callable[[Update, tuple[str, ...]], None] = lambda update, uplink: None
    admit_scores: Callable[[Scores], None] = lambda scores: None
    forget: Callable[[int], None] = lambda client: None
    unsent: Callable[[int], None] = lambda client: None
