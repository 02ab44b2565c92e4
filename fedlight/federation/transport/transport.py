"""The interface of a transport, which carries messages to clients and their answers back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update
from fedlight.federation.server import Server
from fedlight.federation.site import Site
from fedlight.runtime.usage import UsageLog


class Transport(Protocol):
    """The only way between server and clients."""

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        """Sends each broadcast to its client and yields the updates, in any order."""

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        """Sends requests to evaluate the clients' own models; yields the answers, in any order.

        A client in an institution of its own may not answer.
        """


class Monitor(Protocol):
    """Follows the progress of a cell, and ends it."""

    def end_update(self) -> None:
        """Counts a local update that another process did."""

    def check(self) -> None:
        """Raises an exception where the cell is to end, as after a signal; called often, also in waits."""


@dataclass(frozen=True)
class Deployment:
    """A federation between institutions, whose server runs inside a Flower ServerApp.

    Attributes:
        grid: Flower's connection to the nodes.
        agreed: SHA-256 of the configuration that every institution agreed to.
    """

    grid: Any
    agreed: str


@dataclass(frozen=True)
class TransportContext:
    """The parts of a cell that a transport needs.

    Attributes:
        site: where the clients of this process train.
        make_site: makes an equal site in another process; can be pickled.
        max_workers: number of processes for which the machine has cores or devices.
        server: of the cell; validates untrusted updates.
        monitor: of the cell.
        exit_stack: closes at the end of the cell what a transport enters into it.
        check_scores: raises Damaged for untrusted scores that do not fit the evaluator of the cell.
        deployment: None in a simulation.
        usage: takes the reports of workers on their memory and time.
    """

    site: Site
    make_site: Callable[[], Site]
    max_workers: int
    server: Server
    monitor: Monitor
    exit_stack: ExitStack = field(default_factory=ExitStack)
    check_scores: Callable[[Scores], None] = lambda scores: None
    deployment: Deployment | None = None
    usage: UsageLog = field(default_factory=UsageLog)
