"""The server: the global model, what it sends, what it receives, and how a round changes it."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fedlight.federation.admission import check_turn, check_update
from fedlight.federation.aggregate import WeightedMean
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.codec import Codec
from fedlight.federation.cohort import Participation, Task
from fedlight.federation.downlink import Downlink
from fedlight.federation.ledger import Entry, Ledger
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.messages import AUX, Broadcast, Evaluation, Payload, State, Update
from fedlight.federation.method import Method
from fedlight.federation.slices import SliceMap
from fedlight.runtime.errors import BadInput, Damaged
from fedlight.runtime.printable import printable


@dataclass(frozen=True)
class Outcome:
    """What the server knows of a round after its step.

    Attributes:
        train_loss: mean over the updates, weighted by data size, or None where none is known.
        client_losses: client: its mean training loss of an image over its last local epoch.
        cohort: number of clients that took part.
        reports: number of updates that count.
        exchange: every payload that crossed.
    """

    train_loss: float | None
    client_losses: dict[int, float]
    cohort: int
    reports: int
    exchange: list[Entry]


class Server:
    """Holds and updates the global model; the paper calls it the federator.

    Args:
        cell: id of the federation.
        method: resolved over the slices.
        slices: the slice map of the model.
        initial: the first state_dict, on the CPU.
        participation: who takes part.
        algorithm: how the global model steps.
        codec: how slices are encoded.
        average_decay: decay a round of the exponential moving average of the global model that is evaluated
            in its place; None for no average.
        privacy: how updates are clipped and noised; None where they are not.

    Attributes:
        round: rounds completed.
        theta: the global model, all slices.
        average: its moving average over rounds; empty where there is none, and before the first report.
        met: client: the round in which it last took part.
        trained: the clients that have reported; one that always dropped out is not among them.
        ledger: what crossed so far.
    """

    def __init__(
        self,
        cell: str,
        method: Method,
        slices: SliceMap,
        initial: State,
        participation: Participation,
        algorithm: FedAvg,
        codec: Codec,
        average_decay: float | None = None,
        privacy: GaussianMechanism | None = None,
    ) -> None:
        self.cell = cell
        self.method = method
        self.slices = slices
        self.participation = participation
        self._algorithm = algorithm
        self._codec = codec
        self._average_decay = average_decay
        self._privacy = privacy
        self._initial = initial
        self._downlink = Downlink(method, slices, initial, codec, participation.seed)
        self.begin()

    def begin(self) -> None:
        """Puts the server before its first round."""
        self.round = 0
        self.theta: State = self.slices.select(self.slices.names, self._initial)
        self.average: State = {}
        self.state = self._algorithm.init(self._stepped())
        self._private: State = self._privacy.init() if self._privacy else {}
        self.met: dict[int, int] = {}
        self._met_before: dict[int, int] = {}
        self.trained: set[int] = set()
        self.ledger = Ledger()
        self._downlink.begin()
        self._open([])

    @property
    def model_params(self) -> int:
        """N, the number of scalars in all slices."""
        return sum(self.slice_params().values())

    def slice_params(self) -> dict[str, int]:
        """The number of scalars in each slice."""
        return {slice_: Payload.plain(self._slice(slice_)).params for slice_ in self.slices.names}

    @property
    def evaluated(self) -> State:
        """The global model that images are drawn from, all slices: its moving average where there is one."""
        return self.theta | self.average

    def global_state(self) -> State:
        """The whole state_dict to evaluate, what belongs to no slice at its first value."""
        return {name: self._initial[name] for name in self.slices.private} | self.evaluated

    def evaluations(self, clients: Iterable[int], draw: bool) -> Iterator[Evaluation]:
        """The requests to clients to evaluate their own models."""
        state = self.global_state()
        payloads = {name: Payload.plain(self.slices.select([name], state)) for name in self.slices.names}
        for client in clients:
            yield Evaluation(self.cell, self.round, client, self.met.get(client, 0), draw, payloads)

    def broadcasts(self) -> Iterator[Broadcast]:
        """Begins the next round: a message for each client of the cohort, in client order."""
        cohort, tasks = self.participation.draw(self._method_now(), self.round + 1)
        self._cohort = cohort
        self._open(tasks)
        self.theta = self._downlink.open(self.round + 1, self.theta)
        self._met_before = met = dict(self.met)
        self.met.update({task.client: task.round for task in tasks})
        aux = self._exchanged(self._algorithm.broadcast(self.state))
        for task in tasks:
            previous = met.get(task.client, 0)
            payloads = self._downlink.payloads(previous)
            if aux:
                payloads[AUX] = Payload.plain(aux)
            if not self.method.pool:  # the server trains by itself: nothing crosses
                self.ledger.add(task.round, task.client, "down", payloads)
            yield Broadcast(
                self.cell, task.round, task.client, previous, task.uplink, task.drops_out, payloads
            )

    def receive(self, update: Update) -> None:
        """Takes an update, in any sequence; they are added up by client number."""
        if not self.method.pool:
            self.ledger.add(update.round, update.client, "up", update.payloads)
        self._waiting[update.client] = update
        while self._expected and self._expected[0] in self._waiting:
            self._add(self._waiting.pop(self._expected.pop(0)))

    def admit(self, update: Update, uplink: tuple[str, ...]) -> None:
        """Checks an update of a client that nobody can vouch for, before it is received.

        Args:
            update: of this round.
            uplink: the slices that the client was to report.

        Raises:
            Damaged: it is none of this round, or not what `check_update` demands.
        """
        check_turn(update, self.cell, self.round + 1, self._cohort, {*self._waiting, *self._losses})
        aux_like = self._algorithm.aux_like(self.slices.parameters(self.slices.select(uplink, self.theta)))
        held = {slice_: self._downlink.held(slice_) for slice_ in uplink}
        optional = self._algorithm.absent_is_zero
        check_update(update, held, aux_like, optional, self._codec.up, self._privacy is not None)
        if self._privacy:
            self._privacy.admit(*self.decode(update), self._federated(), self._aux_like(), self._private)

    def unsent(self, client: int) -> None:
        """Takes back the downlink of a client that could not be sent to: nothing crossed."""
        self.ledger.withdraw(client)
        self._unsent.add(client)

    def forget(self, client: int) -> None:
        """Takes a client whose memory is lost for one that was never met."""
        self._met_before.pop(client, None)
        self._forgot = True

    def decode(self, update: Update) -> tuple[State, State]:
        """What an update of this round says: the values of its slices, and the extras."""
        values: State = {}
        for slice_, payload in update.payloads.items():
            if slice_ != AUX:
                values |= self._codec.decode(payload, self._downlink.held(slice_))
        return values, update.payloads[AUX].tensors if AUX in update.payloads else {}

    def finish_round(self) -> Outcome:
        """Ends the round with what was received: aggregates, and lets the algorithm step.

        A client that was expected and did not report has last been met in an earlier round.
        """
        for client in set(self._expected).difference(self._waiting):
            if client in self._met_before:
                self.met[client] = self._met_before[client]
            else:
                del self.met[client]
        for client in sorted(self._waiting):
            self._add(self._waiting.pop(client))
        if self._privacy:
            self._private = self._privacy.finish(
                self.round + 1,
                self._mean,
                self._aux,
                self._federated(),
                self._aux_like(),
                self._fitting,
                self._private,
            )
        if self._losses or self._privacy:
            mean = self._mean.result()
            stepped = self.slices.parameters(mean)
            theta, self.state = self._algorithm.step(self._stepped(), stepped, self._merged_aux(), self.state)
            self._check_step(theta)
            self.theta.update({name: mean[name] for name in mean if name not in stepped} | theta)
            self._update_average()
        self.round += 1
        if self._forgot:
            self.state = self._algorithm.forget(self.state, self.round)
        known = {client: (n, loss) for client, (n, loss) in self._losses.items() if loss is not None}
        total = sum(num_examples for num_examples, _ in known.values())
        weighted = sum(num_examples * loss for num_examples, loss in known.values())
        uplinks = len(self._cohort) if self.method.pool else len(self._losses)
        return Outcome(
            train_loss=weighted / total if total else None,
            client_losses={client: loss for client, (_, loss) in known.items()},
            cohort=len(self._cohort),
            reports=len(self._losses),
            exchange=self.ledger.finish_round(len(self._cohort) - len(self._unsent) + uplinks),
        )

    def save(self, checkpoint: ServerCheckpoint, history: dict[str, Any]) -> None:
        """Stores all that a restart needs after a round; with it the round is done."""
        ledger = {"ledger": self.ledger.rows(), "visits": self.ledger.visits}
        who = {"met": sorted(self.met.items()), "trained": sorted(self.trained)}
        header = {**who, **ledger, "history": history}
        own = {
            "theta": self.theta,
            "average": self.average,
            "algorithm": self.state,
            "privacy": self._private,
        }
        groups = own | self._downlink.state()
        checkpoint.write(self.round, header, groups)

    def resume(self, checkpoint: ServerCheckpoint, before: int | None = None) -> dict[str, Any] | None:
        """Puts the server after the last round that was stored, or before the first.

        Args:
            checkpoint: where to read.
            before: only rounds before this one count.

        Returns:
            The history that was stored with it, or None.
        """
        for round_, header, groups in checkpoint.read():
            if before is None or round_ < before:
                self.round, self.met = round_, dict(header["met"])
                self.trained = set(header.get("trained", self.met))
                self.theta, self.average = groups["theta"], groups.get("average", {})
                self.state = groups.get("algorithm", {})
                self._downlink.restore(groups)
                self._private = groups.get("privacy", {})
                self.ledger.restore(header["ledger"], header["visits"])
                history: dict[str, Any] = header["history"]
                return history
        self.begin()
        return None

    def _open(self, tasks: list[Task]) -> None:
        self._expected = sorted(task.client for task in tasks if not task.drops_out)
        self._waiting: dict[int, Update] = {}
        self._unsent: set[int] = set()
        self._forgot = False
        self._losses: dict[int, tuple[int, float | None]] = {}
        self._fitting: list[bool] = []
        self._mean, self._aux = WeightedMean(self._federated()), WeightedMean(self._aux_like())
        self.ledger.discard_round()

    def _add(self, update: Update) -> None:
        """Decodes an update and adds it to the mean; under privacy it may be anything, and is checked."""
        if self._privacy is None:
            values, aux = self.decode(update)
            weight = self._algorithm.weight(update.num_examples)
        else:
            try:
                check_turn(update, self.cell, self.round + 1, self._cohort, self._losses)
                values, aux, fits = self._privacy.admit(
                    *self.decode(update), self._federated(), self._aux_like(), self._private
                )
            except (Damaged, KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = error if isinstance(error, Damaged) else f"cannot be decoded ({error!r})"
                refusal = f"the update of client {update.client} {printable(reason)}: refused"
                print(f"fedlight: {refusal}", file=sys.stderr)
                return
            self._fitting.append(fits)
            weight = 1
        self._aux.add(aux, weight)
        self._mean.add(values, weight)
        self.trained.add(update.client)
        self._losses[update.client] = update.num_examples, update.loss

    def _check_step(self, theta: State) -> None:
        """Raises BadInput where the algorithm's step returned what is no part of the global model."""
        for name, tensor in theta.items():
            held = self.theta.get(name)
            expected = None if held is None else (held.dtype, tuple(held.shape))
            if (found := (tensor.dtype, tuple(tensor.shape))) != expected:
                wanted = "which is no part of the global model" if held is None else f"expected {expected}"
                who = f"{type(self._algorithm).__module__}.{type(self._algorithm).__qualname__}"
                raise BadInput(f"algorithm {who}: step returned {found} for {name}, {wanted}")

    def _aux_like(self) -> State:
        return self._algorithm.aux_like(self._stepped())

    def _merged_aux(self) -> State:
        clients = 1 if self.method.pool else self.participation.clients
        return self._aux.result(clients if self._algorithm.absent_is_zero else None)

    def _update_average(self) -> None:
        """average = decay * average + (1 - decay) * theta, from the first round's theta on."""
        if self._average_decay is None:
            return
        for name, tensor in self.theta.items():
            if name in self.average and tensor.is_floating_point():
                tensor = torch.lerp(self.average[name], tensor, 1 - self._average_decay)
            self.average[name] = tensor

    def _slice(self, slice_: str) -> State:
        return self.slices.select([slice_], self.theta)

    def _federated(self) -> State:
        return self.slices.select(self._method_now().uplink, self.theta)

    def _stepped(self) -> State:
        """The federated parameters, without buffers: what the algorithm steps."""
        return self.slices.parameters(self._federated())

    def _exchanged(self, aux: State) -> State:
        """What an algorithm sends, as far as it concerns the slices of this round."""
        return self.slices.auxiliary(self._method_now().downlink, aux)

    def _method_now(self) -> Method:
        """What the method is in the round under way."""
        return self.method.in_round(self.round + 1, self.slices.names)
