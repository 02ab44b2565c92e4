"""The server: the global model, what it sends, what it receives, and how a round changes it."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlight.federation.admission import (
    check_private_tensors,
    check_private_update,
    check_turn,
    check_update,
)
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.average import update_average
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client_ranks import ClientRanks
from fedlight.federation.codec import Codec
from fedlight.federation.cohort import Participation
from fedlight.federation.downlink import Downlink
from fedlight.federation.ledger import Direction, Ledger
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.messages import AUX, Broadcast, Evaluation, Payload, State, Update
from fedlight.federation.method import Method
from fedlight.federation.open_round import OpenRound, Outcome
from fedlight.federation.secure.masks import hash_model
from fedlight.federation.secure.secure_sum import SecureAggregation, SliceSums
from fedlight.federation.slices import SliceMap
from fedlight.federation.step import step_model
from fedlight.runtime.errors import Damaged
from fedlight.runtime.printable import printable
from fedlight.runtime.stopwatch import Stopwatch

MASKS = "aggregation"  # name in the ledger of keys and shares


class Server:
    """Holds and updates the global model; the paper calls it the federator.

    A round is `start_round`, `receive` for each update, `finish_round`.

    Args:
        cell: id of the federation.
        method: with the names of its slices checked against the slice map.
        slices: the slice map of the model.
        initial: the first state_dict, on the CPU.
        participation: decides the cohort and the tasks of each round.
        algorithm: how the global model steps.
        codec: how slices are encoded.
        average_decay: decay a round of the exponential moving average of the global model that is evaluated
            in its place; None for no average.
        privacy: how updates are clipped and noised; None where they are not.
        secure: how the sums of updates are decoded; None where updates are received one by one.
        ranks: the part of each low-rank factor that a client has.

    Attributes:
        round: rounds completed.
        theta: the global model, all slices.
        average: its moving average over rounds; empty where there is none, and before the first report.
        state: the algorithm's own state.
        met: client: the round in which it last took part.
        trained: the clients that have reported; one that always dropped out is not among them.
        ledger: the account of all payloads so far.
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
        secure: SecureAggregation | None = None,
        ranks: ClientRanks | None = None,
    ) -> None:
        self.cell = cell
        self.method = method
        self.slices = slices
        self.participation = participation
        self._algorithm = algorithm
        self._codec = codec
        self._average_decay = average_decay
        self._privacy = privacy
        self.secure = secure
        self.ranks = ranks or ClientRanks()
        self._initial = initial
        self._downlink = Downlink(method, slices, initial, codec, participation.seed)
        self._watch = Stopwatch()
        self.reset()

    def reset(self) -> None:
        """Returns the server to its state before the first round."""
        self.round = 0
        self.theta: State = self.slices.select(self.slices.names, self._initial)
        self.average: State = {}
        self.state = self._algorithm.init(self._stepped())
        self._private: State = self._privacy.init() if self._privacy else {}
        self.met: dict[int, int] = {}
        self.trained: set[int] = set()
        self.ledger = Ledger()
        self._downlink.reset()
        self._open = OpenRound([], [], {}, {}, {})

    # --- a round ---

    def start_round(self) -> list[Broadcast]:
        """Draws the cohort of the next round and encodes its broadcasts.

        Returns:
            A broadcast for each client with a task, in client order. They share their payloads where clients
            last took part in the same round and have the same rank, so that each costs references only.
        """
        round_ = self.round + 1
        cohort, tasks = self.participation.draw(self._method_now(), round_)
        self.ledger.discard_round()
        self.theta = self._downlink.advance(round_, self.theta)
        sums = SliceSums(self.secure, self._federated()) if self.secure else None
        self._open = OpenRound(cohort, tasks, self.met, self._federated(), self._aux_like(), sums)
        self._watch.take()

        aux = self.slices.auxiliary(self._method_now().downlink, self._algorithm.broadcast(self.state))
        beside = {AUX: Payload.plain(aux)} if aux else {}
        payloads: dict[tuple[int, int | None], dict[str, Payload]] = {}
        broadcasts = []
        for task in tasks:
            client, previous = task.client, self.met.get(task.client, 0)
            version = previous, self.ranks.of(client)
            if version not in payloads:
                payloads[version] = self._payloads(client, previous, beside)
            if not self.method.pool:  # the server trains by itself: nothing is sent
                self.ledger.add(round_, client, "down", payloads[version])
            broadcasts.append(
                Broadcast(self.cell, round_, client, previous, task.uplink, task.drops_out, payloads[version])
            )
        self.met |= {task.client: round_ for task in tasks}
        return broadcasts

    def receive(self, update: Update) -> None:
        """Takes an update of the open round, in any order; updates are added up in client order."""
        with self._watch:
            if not self.method.pool:
                self.ledger.add(update.round, update.client, "up", update.payloads)
            for ready in self._open.receive(update):
                self._add(ready)

    def finish_round(self) -> Outcome:
        """Ends the round with the updates that were received: aggregates, and lets the algorithm step.

        For a client that was awaited and did not report, `met` is set back to its earlier round.
        """
        with self._watch:
            current = self._open
            for client, previous in current.missing().items():
                if previous:
                    self.met[client] = previous
                else:
                    del self.met[client]
            for update in current.take_waiting():
                self._add(update)
            if current.sums:
                self._decode_sums(current.sums)
            if self._privacy and not current.lost:
                self._private = self._privacy.finish(
                    self.round + 1,
                    current.mean,
                    current.aux,
                    self._federated(),
                    self._aux_like(),
                    current.within_clip,
                    self._private,
                )
            if not current.lost and (current.reports or self._privacy):
                self._step()
            self.round += 1
            if current.memory_lost:
                self.state = self._algorithm.forget(self.state, self.round)
            uplinks = len(current.cohort) if self.method.pool else len(current.reports)
            exchange = self.ledger.finish_round(len(current.cohort) - len(current.unsent) + uplinks)
        return Outcome(
            round=self.round,
            train_loss=current.train_loss,
            client_losses=current.client_losses,
            cohort=len(current.cohort),
            reports=len(current.reports),
            num_examples={client: images for client, (images, _) in current.reports.items()},
            exchange=exchange,
            merging=self._watch.take(),
        )

    # --- clients in institutions of their own ---

    def admit(self, update: Update, uplink: tuple[str, ...]) -> None:
        """Validates one untrusted update before it is received.

        Args:
            update: of the open round.
            uplink: the slices that the client was to report.

        Raises:
            Damaged: it is not of this round, or fails `check_update`.
        """
        check_turn(update, self.cell, self.round + 1, self._open.cohort, self._open.received)
        if self.secure:
            self.secure.check_update(update, uplink, self._federated())
            return
        like = self._algorithm.aux_like(self.slices.parameters(self.slices.select(uplink, self.theta)))
        aux_like = self.ranks.cut(update.client, like)
        received = {slice_: self._received(slice_, update.client) for slice_ in uplink}
        optional = self._algorithm.absent_is_zero
        check_update(update, received, aux_like, optional, self._codec.up, self._privacy is not None)
        if self._privacy:
            check_private_update(*self.decode(update), self._federated(), self._aux_like())

    def withdraw(self, client: int) -> None:
        """Removes a broadcast that did not reach its client from the ledger."""
        self.ledger.withdraw(client)
        self._open.unsent.add(client)

    def forget(self, client: int) -> None:
        """Treats a client whose memory is lost as one that has never taken part."""
        self._open.note_lost_memory(client)

    # --- masks of secure aggregation ---

    @property
    def planned(self) -> dict[int, tuple[str, ...]]:
        """Client of the open round: the slices that it is to report."""
        return self._open.planned

    def hash_sent(self) -> bytes:
        """SHA-256 of what the clients of the open round receive: the global slices and auxiliary state."""
        slices = self._method_now().downlink
        values = {name: tensor for s in slices for name, tensor in self._downlink.received(s).items()}
        aux = self.slices.auxiliary(slices, self._algorithm.broadcast(self.state))
        return hash_model(values, aux)

    def count_masks(self, client: int, direction: Direction, size: int) -> None:
        """Counts bytes of keys and shares that were sent in the open round."""
        key = client, direction
        self._open.mask_bytes[key] = self._open.mask_bytes.get(key, 0) + size

    def count_expected_masks(self) -> None:
        """Adds to the ledger the keys and shares of the open round, of all clients that do not drop out."""
        self._expect_masks(self._open.awaited)
        self._add_masks()

    def unmask(self, masks: dict[str, NDArray[np.uint64]]) -> None:
        """Takes the sum of the masks of each slice, to be subtracted from that of the received updates."""
        self._open.masks = masks

    def lose_round(self, reason: str) -> None:
        """Discards the updates of the open round, whose sum must not be known."""
        self._open.lost = reason

    # --- the global model ---

    @property
    def model_params(self) -> int:
        """N, the number of scalars in all slices."""
        return sum(self.slice_params().values())

    def slice_params(self) -> dict[str, int]:
        """The number of scalars in each slice."""
        return {
            slice_: Payload.plain(self.slices.select([slice_], self.theta)).params
            for slice_ in self.slices.names
        }

    @property
    def evaluated(self) -> State:
        """The global model that images are drawn from, all slices: its moving average where there is one."""
        return self.theta | self.average

    def global_state(self) -> State:
        """The state_dict to evaluate; tensors that belong to no slice have their first values."""
        return {name: self._initial[name] for name in self.slices.private} | self.evaluated

    def evaluations(self, clients: Iterable[int], draw: bool) -> Iterator[Evaluation]:
        """The requests to clients to evaluate their own models."""
        state = self.global_state()
        payloads = {name: Payload.plain(self.slices.select([name], state)) for name in self.slices.names}
        for client in clients:
            yield Evaluation(self.cell, self.round, client, self.met.get(client, 0), draw, payloads)

    def decode(self, update: Update) -> tuple[State, State]:
        """The values of the slices in an update of the open round, and its auxiliary state, of rank R."""
        values: State = {}
        for slice_, payload in update.payloads.items():
            if slice_ != AUX:
                values |= self._codec.decode(payload, self._received(slice_, update.client))
        aux = update.payloads[AUX].tensors if AUX in update.payloads else {}
        return self.ranks.pad(update.client, values), self.ranks.pad(update.client, aux)

    # --- restarts ---

    def save(self, checkpoint: ServerCheckpoint, history: dict[str, Any]) -> None:
        """Stores the state after a round that a restart needs; with it the round is complete.

        Args:
            checkpoint: where to write.
            history: of the cell so far; `resume` returns it.
        """
        header = {
            "met": sorted(self.met.items()),
            "trained": sorted(self.trained),
            "ledger": self.ledger.rows(),
            "visits": self.ledger.visits,
            "history": history,
        }
        groups = {
            "theta": self.theta,
            "average": self.average,
            "algorithm": self.state,
            "privacy": self._private,
        }
        checkpoint.write(self.round, header, groups | self._downlink.state())

    def resume(self, checkpoint: ServerCheckpoint, before: int | None = None) -> dict[str, Any] | None:
        """Restores the state after the last stored round, or before the first round.

        Args:
            checkpoint: where to read.
            before: only rounds before this one count.

        Returns:
            The history that was stored with it, or None.

        Raises:
            Damaged: the stored model is not one of this architecture.
        """
        for round_, header, groups in checkpoint.read():
            if before is None or round_ < before:
                self._check_stored(groups)
                self.round, self.met = round_, dict(header["met"])
                self.trained = set(header.get("trained", self.met))
                self.theta, self.average = groups["theta"], groups.get("average", {})
                self.state = groups.get("algorithm", {})
                self._downlink.restore(groups)
                self._private = groups.get("privacy", {})
                self.ledger.restore(header["ledger"], header["visits"])
                history: dict[str, Any] = header["history"]
                return history
        self.reset()
        return None

    def _check_stored(self, groups: dict[str, State]) -> None:
        """Raises Damaged where stored tensors do not have the names, shapes and dtypes of the model."""
        like = self.slices.select(self.slices.names, self._initial)
        for group in ("theta", "average", "reference"):
            stored = groups.get(group, {})
            if stored.keys() != like.keys() and (stored or group == "theta"):
                raise Damaged(f"the stored server has other tensors in {group} than the model of the cell")
            for name, tensor in stored.items():
                if (tensor.shape, tensor.dtype) != (like[name].shape, like[name].dtype):
                    raise Damaged(
                        f"the stored server has {name} of shape {tuple(tensor.shape)}, {tensor.dtype}, in "
                        f"{group}; the model of the cell has {tuple(like[name].shape)}, {like[name].dtype}"
                    )

    # --- steps of a round ---

    def _payloads(self, client: int, previous: int, beside: dict[str, Payload]) -> dict[str, Payload]:
        """All payloads for a client that last took part in the round `previous`, 0 for never.

        An encoded difference serves clients of all ranks: with one, all that is sent is of the largest rank.
        """
        sent = self._downlink.payloads(previous) | beside
        if not self.ranks or self._codec.down:
            return sent
        return {name: Payload.plain(self.ranks.cut(client, p.tensors)) for name, p in sent.items()}

    def _received(self, slice_: str, client: int) -> State:
        """A client's part of a slice, as it received it in this round."""
        return self.ranks.cut(client, self._downlink.received(slice_))

    def _add(self, update: Update) -> None:
        """Decodes an update and adds it to the mean; client-level privacy refuses an invalid one."""
        if self._open.sums:
            self._open.sums.add(update)
            self._open.reports[update.client] = 0, None
            return
        if self._privacy is None:
            values, aux = self.decode(update)
            weight = self._algorithm.weight(update.num_examples)
        else:
            try:
                values, aux, within_clip = self._clip(update, self._privacy)
            except (Damaged, KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = error if isinstance(error, Damaged) else f"cannot be decoded ({error!r})"
                refusal = f"the update of client {update.client} {printable(reason)}: refused"
                print(f"fedlight: {refusal}", file=sys.stderr)
                return
            self._open.within_clip.append(within_clip)
            weight = 1
        self._open.aux.add(aux, weight)
        self._open.mean.add(self._algorithm.summand(values), weight)
        self.trained.add(update.client)
        self._open.reports[update.client] = update.num_examples, update.loss

    def _decode_sums(self, sums: SliceSums) -> None:
        """Decodes the sums of the round; one of too few clients, or an invalid one, is lost."""
        current, secure = self._open, self.secure
        assert secure
        reporters, planned = set(current.reports), len(current.planned)
        if current.masks is not None:
            sums.unmask(current.masks)
        if not current.lost and not secure.can_unmask(planned, len(reporters)):
            current.lost = f"{len(reporters)} of {planned} clients reported, too few to unmask"
            self.ledger.withdraw_updates()  # between institutions none would have been sent
        if not current.mask_bytes:
            self._expect_masks(reporters)
        self._add_masks()
        counted: set[int] = set()
        for slice_, fewest in secure.smallest_sums(current.planned).items():
            if not current.lost:
                counted |= self._decode_sum(sums, slice_, fewest)
        if not counted:
            current.lost = current.lost or "no slice has a sum"
            self._report(f"the round is lost: {current.lost}; the global model stays as it is")
        self.trained |= counted
        current.reports = dict.fromkeys(sorted(counted), (0, None))
        current.within_clip = [True] * len(counted)

    def _decode_sum(self, sums: SliceSums, slice_: str, fewest: int) -> set[int]:
        """Adds the mean of a slice to those of the round; returns its clients, none where it is lost."""
        clients = sums.reporters.get(slice_, set())
        if len(clients) < fewest:
            some = "1 client" if len(clients) == 1 else f"{len(clients)} clients"
            self._report(f"slice {slice_} is lost: {some}, and a sum has {fewest} at least")
            return set()
        try:
            mean = sums.decode(slice_)
        except Damaged as error:
            self._report(f"slice {slice_} is lost: {error}")
            return set()
        self._open.mean.add(mean.values, mean.weight)
        self._open.aux.add(mean.aux, mean.weight)
        if self.secure and self.secure.sums_loss:
            self._open.add_loss(mean.loss, mean.weight)
        return clients

    def _expect_masks(self, reporters: set[int]) -> None:
        """Counts the keys and shares that would be sent if these clients report and none of them fails."""
        assert self.secure
        for client, (down, up) in self.secure.mask_traffic(self.planned, reporters).items():
            if down:
                self.count_masks(client, "down", down)
            self.count_masks(client, "up", up)

    def _add_masks(self) -> None:
        for (client, direction), size in sorted(self._open.mask_bytes.items()):
            self.ledger.add_bytes(self.round + 1, client, direction, MASKS, size)

    def _report(self, what: str) -> None:
        print(f"fedlight: round {self.round + 1}: {what}", file=sys.stderr)

    def _clip(self, update: Update, privacy: GaussianMechanism) -> tuple[State, State, bool]:
        """Validates one untrusted update and clips it; also returns whether it was within the clip."""
        check_turn(update, self.cell, self.round + 1, self._open.cohort, self._open.reports)
        values, aux = self.decode(update)
        theta, aux_like = self._federated(), self._aux_like()
        if privacy.at_clients:
            check_private_update(values, aux, theta, aux_like)
            return values, aux, True
        check_private_tensors(values, aux, theta, aux_like)
        return privacy.clip_update(values, aux, theta, self._private)

    def _step(self) -> None:
        """Steps the global model by the means of the round."""
        clients = 1 if self.method.pool else self.participation.clients
        aux = self._open.aux.result(clients if self._algorithm.absent_is_zero else None)
        mean = self._fill(self._open.mean.result())
        self.theta, self.state = step_model(
            self._algorithm, self.slices, self.theta, self._stepped(), mean, aux, self.state
        )
        if self._average_decay is not None:
            self.average = update_average(self.average, self.theta, self._average_decay)

    def _fill(self, mean: State) -> State:
        """The mean, with theta in the rows and columns of factors that no client of the round has."""
        for slice_, names in self.slices.names.items() if self.ranks else ():
            reporters = [c for c in self._open.reports if slice_ in self._open.planned[c]]
            reported = {name: mean[name] for name in names if name in mean}
            mean |= self.ranks.fill(reported, self.theta, reporters)
        return mean

    def _method_now(self) -> Method:
        """The method as it is in the next or open round, which may be of the warm start."""
        return self.method.in_round(self.round + 1, self.slices.names)

    def _federated(self) -> State:
        """The slices of theta that clients report in this round."""
        return self.slices.select(self._method_now().uplink, self.theta)

    def _stepped(self) -> State:
        """The parameters of the reported slices, without buffers: what the algorithm steps."""
        return self.slices.parameters(self._federated())

    def _aux_like(self) -> State:
        """Tensors like the auxiliary state that clients report."""
        return self._algorithm.aux_like(self._stepped())
