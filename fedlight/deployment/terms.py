"""The terms of an agreement for one institution: what a server may request of it in which round."""

from collections.abc import Callable
from dataclasses import dataclass

from fedlight.config import CellConfig
from fedlight.experiment.aggregation_checks import planned_uplinks
from fedlight.experiment.mechanisms import make_participation
from fedlight.experiment.scored_models import is_evaluation_round
from fedlight.federation.cohort import Participation
from fedlight.federation.messages import Broadcast, Evaluation
from fedlight.federation.method import Method
from fedlight.runtime.errors import Damaged


@dataclass(frozen=True)
class Terms:
    """Checks each message of a server against the agreement.

    Attributes:
        method: resolved over the slices.
        slices: of the model.
        rounds: R.
        participation: who takes part in which round.
        draws_after: whether the agreement has images drawn from the client's model after a round, 1..R.
    """

    method: Method
    slices: tuple[str, ...]
    rounds: int
    participation: Participation
    draws_after: Callable[[int], bool]

    @classmethod
    def make(cls, config: CellConfig, method: Method, slices: tuple[str, ...]) -> "Terms":
        """The terms of a configuration."""
        draws = config.evaluation.samples > 0 or config.evaluation.grid > 0
        return cls(
            method,
            slices,
            config.rounds,
            make_participation(config),
            lambda round_: draws and is_evaluation_round(round_, config),
        )

    def check_broadcast(self, broadcast: Broadcast) -> None:
        """Raises Damaged for a broadcast that the agreement does not provide for."""
        round_, method = broadcast.round, self._method_in(broadcast.round)
        self._check_previous(broadcast.previous, round_ - 1)
        if undeclared := sorted(set(broadcast.uplink).difference(self._uplink(broadcast.client, round_))):
            raise Damaged(f"{method.name} does not let {', '.join(undeclared)} leave in round {round_}")

    def check_evaluation(self, request: Evaluation) -> None:
        """Raises Damaged for a request for scores that the agreement does not provide for."""
        self._method_in(request.round)
        if self.method.evaluate != "clients":
            raise Damaged(f"{self.method.name} requests scores from no client")
        if not (self.draws_after(request.round) if request.draw else request.round == self.rounds):
            what = "images from a client's model" if request.draw else "the fingerprint of a client's model"
            raise Damaged(f"the agreement does not provide for {what} after round {request.round}")
        self._check_previous(request.previous, request.round)

    def uplinks(self, round_: int) -> dict[int, tuple[str, ...]]:
        """Client: the slices that the agreement has it report in a round, under secure aggregation."""
        return planned_uplinks(self._method_in(round_), self.participation, round_)

    def _method_in(self, round_: int) -> Method:
        if not 1 <= round_ <= self.rounds:
            raise Damaged(f"the agreement has rounds 1 to {self.rounds}, and this is of round {round_}")
        return self.method.in_round(round_, self.slices)

    def _check_previous(self, previous: int, last: int) -> None:
        if not 0 <= previous <= last:
            raise Damaged(f"a client cannot have taken part in round {previous} of {last}")

    def _uplink(self, client: int, round_: int) -> tuple[str, ...]:
        """The slices that the client reports in a round; only the server knows a secret cohort.

        Raises:
            Damaged: the client does not take part in it.
        """
        method = self._method_in(round_)
        if self.participation.secret:
            return tuple(method.uplink)
        for task in self.participation.draw(method, round_)[1]:
            if task.client == client:
                return task.uplink
        raise Damaged(f"client {client} does not take part in round {round_}")
