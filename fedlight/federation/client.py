"""A client: its local update is a pure function of the broadcast, the client's memory and its data."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.client_ranks import ClientRanks, RankLimit
from fedlight.federation.codec import Codec
from fedlight.federation.federator import Federator, on_cpu
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.messages import AUX, Broadcast, Evaluation, Payload, Scores, State, Update
from fedlight.federation.method import Method
from fedlight.federation.secure.secure_sum import SecureAggregation
from fedlight.federation.slices import SliceMap
from fedlight.federation.stack import Gathering, RandomState, StackedData, cached_stack, stack, unstack
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.seeds import derive_seed, stream
from fedlight.runtime.stopwatch import Stopwatch

Memory: TypeAlias = dict[str, State]
"""The state of a client between rounds: `model` (private tensors), `optimizer`, `algorithm`, `errors` (of
encoding), `reference` (the received slices, where later broadcasts hold deltas to them)."""

Evaluate: TypeAlias = Callable[
    [Sequence[State], int, Sequence[int]], list[tuple[dict[str, float], dict[str, State]]]
]
"""Draws images from models and scores them: (state_dicts, round, clients) -> for each its metrics, and images
for the grid."""


@dataclass(frozen=True)
class ClientSetup:
    """The parts of a client that are the same in every round.

    Attributes:
        seed: of the federation; a local update draws from the stream (seed, round, client) alone.
        module: the client model with its first weights; its state is replaced before each use. It may have
            `counters`: state_dict names of integers that count steps, and decide nothing once they are not 0.
        slices: the slice map of the module.
        method: resolved over the slices.
        algorithm: adds callbacks and auxiliary state to local training.
        codec: how reported slices are encoded.
        data: returns the data module of a client; it has `num_examples`.
        make_trainer: makes the Trainer of one local update from its callbacks.
        evaluate: draws from models and scores them.
        rate: returns the factor of the optimizer's learning rate in a round.
        fuse: largest number of clients that train in one computation; with more than 1 the module is Fusible.
        fuse_unequal: whether clients with different numbers of batches may train in one computation.
        epoch_batches: returns how many of a client's batches a local epoch takes.
        drawn_together: largest number of models from which images are drawn in one computation.
        first: the first state_dict; the cell's seed decides it.
        privacy: client-level privacy: clips updates and adds noise; n_k and the loss are not reported. None
            for no such privacy.
        secure: secure aggregation: updates are vectors of integers, n_k and the loss are parts of them. None
            for none.
        private_training: example-level privacy: makes the callback of a client that clips its gradients and
            adds noise to them. None for no such privacy.
        ranks: the part of each low-rank factor that a client has.
    """

    seed: int
    module: LightningModule
    slices: SliceMap
    method: Method
    algorithm: FedAvg
    codec: Codec
    data: Callable[[int], Any]
    make_trainer: Callable[[list[Any]], Trainer]
    evaluate: Evaluate
    rate: Callable[[int], float] = lambda round_: 1.0
    fuse: int = 1
    fuse_unequal: bool = True
    epoch_batches: Callable[[int], int] = lambda batches: batches
    drawn_together: int = 1
    privacy: GaussianMechanism | None = None
    secure: SecureAggregation | None = None
    private_training: Callable[[int], Callback] | None = None
    drawing: Stopwatch = field(default_factory=Stopwatch)
    ranks: ClientRanks = field(default_factory=ClientRanks)
    first: State = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", on_cpu(self.module.state_dict()))

    @cached_property
    def private(self) -> tuple[str, ...]:
        """The state_dict names whose tensors are private to a client after its first contact."""
        private_slices = [slice_ for slice_ in self.slices.names if slice_ not in self.method.downlink]
        return (
            *self.slices.private,
            *(name for slice_ in private_slices for name in self.slices.names[slice_]),
        )

    def count_batches(self, data: Any) -> int:
        """The number of batches in a local epoch of a client."""
        return self.epoch_batches(len(data.train_dataloader()))

    @property
    def keeps_memory(self) -> bool:
        """Whether clients have a state that lasts from round to round."""
        encodes = self.codec.up or self.codec.down
        return bool(self.private or self.method.keep_optimizer or encodes or self.algorithm.keeps_memory)


@dataclass(frozen=True)
class Start:
    """What a client trains from: its broadcast, merged with its memory.

    Attributes:
        broadcast: of this round.
        memory: of the client after its last round; empty at first contact.
        method: with the slices of this round.
        state: the state_dict: the received slices over the private ones.
        received: the received slices.
        reference: the received slices as the server knows them, of the largest rank.
        aux: the auxiliary state that the algorithm sends.
        algorithm: the part of the memory that is the algorithm's.
        optimizer: the state to continue from; None for a new optimizer.
    """

    broadcast: Broadcast
    memory: Memory
    method: Method
    state: State
    received: State
    reference: State
    aux: State
    algorithm: State
    optimizer: State | None

    def signature(self, counters: Collection[str]) -> tuple[Any, ...]:
        """Equal where clients can be stacked: the names of tensors, and values without a dimension.

        Args:
            counters: names of the state_dict of which only matters whether they are 0.
        """
        states = {"state": self.state, "algorithm": self.algorithm, "optimizer": self.optimizer or {}}
        return tuple(
            (kind, name, None if tensor.dim() else _value(tensor, kind == "state" and name in counters))
            for kind, state in states.items()
            for name, tensor in state.items()
        )


def _value(scalar: Tensor, is_counter: bool) -> float | bool:
    return bool(scalar) if is_counter else scalar.item()


@dataclass(frozen=True)
class End:
    """What a client has after its local epochs.

    Attributes:
        trained: the state_dict.
        optimizer: the state to keep; empty where none is kept.
        algorithm: the tensors of the algorithm's callbacks.
        steps: optimizer steps.
        loss: mean training loss of an image over the last local epoch.
        images: n_k.
    """

    trained: State
    optimizer: State
    algorithm: State
    steps: int
    loss: float
    images: int


def local_update(broadcast: Broadcast, memory: Memory, setup: ClientSetup) -> tuple[Update | None, Memory]:
    """Answers a broadcast: trains E local epochs by a new Trainer with the Federator as its callback.

    Args:
        broadcast: of this round.
        memory: of the client after its last round; empty at first contact.
        setup: of the client.

    Returns:
        The update, or None where the client drops out; and the new memory.

    Raises:
        Diverged: the loss or the weights left the finite numbers.
    """
    return local_updates([broadcast], [memory], setup)[0]


def local_updates(
    broadcasts: Sequence[Broadcast], memories: Sequence[Memory], setup: ClientSetup
) -> list[tuple[Update | None, Memory]]:
    """Answers the broadcasts of a group of clients, which train in one computation where they can be stacked.

    Each client's draws are those that it has alone. The clients with most batches are first in a group.
    """
    starts = [_start(*pair, setup) for pair in zip(broadcasts, memories, strict=True)]
    stackable: dict[Any, list[Start]] = {}
    counters = getattr(setup.module, "counters", ())
    for start in starts:
        if not start.broadcast.drops_out:
            signature = start.signature(counters) if len(starts) > 1 else None
            stackable.setdefault(signature, []).append(start)
    ends: dict[int, End] = {}
    for members in stackable.values():
        clients = [start.broadcast.client for start in members]
        ends |= zip(clients, _train(members, setup), strict=True)
    return [_finish(start, ends.get(start.broadcast.client), setup) for start in starts]


def _start(broadcast: Broadcast, memory: Memory, setup: ClientSetup) -> Start:
    state = {**setup.first, **memory.get("model", {}), **memory.get("reference", {})}
    for slice_, payload in broadcast.payloads.items():
        if slice_ != AUX:
            state |= setup.codec.down.values(payload, setup.slices.select([slice_], state))
    method = setup.method.in_round(broadcast.round, setup.slices.names)
    reference = setup.slices.select(method.downlink, state)
    state = setup.ranks.clear(broadcast.client, state)
    aux = broadcast.payloads[AUX].tensors if AUX in broadcast.payloads else {}
    return Start(
        broadcast,
        memory,
        method,
        state,
        received=setup.slices.select(method.downlink, state),
        reference=reference,
        aux=setup.ranks.clear(broadcast.client, aux),
        algorithm=setup.slices.auxiliary(method.downlink, memory.get("algorithm", {})),
        optimizer=memory.get("optimizer", {}) if setup.method.keep_optimizer else None,
    )


def _train(starts: Sequence[Start], setup: ClientSetup) -> Iterator[End]:
    """Trains one client, or several that are stacked, by one Trainer."""
    first = starts[0]
    clients, round_ = [start.broadcast.client for start in starts], first.broadcast.round
    seeds = [derive_seed(setup.seed, "client", round_, client) for client in clients]
    seed_everything(seeds[0], verbose=False)
    state, received, aux, memory = (
        stack([getattr(start, name) for start in starts])
        for name in ("state", "received", "aux", "algorithm")
    )
    optimizer = None if first.optimizer is None else stack([start.optimizer or {} for start in starts])
    frozen = setup.slices.select(first.method.freeze, state)
    data = [setup.data(client) for client in clients]
    batches = [setup.count_batches(part) for part in data] if len(data) > 1 else None
    federator = Federator(clients, round_, state, optimizer, setup.rate(round_), frozen, batches)
    callbacks = setup.algorithm.callbacks(setup.slices.parameters(received), aux, memory)
    if setup.private_training:
        callbacks = [setup.private_training(clients[0]), *callbacks]
    if setup.ranks:
        callbacks = [*callbacks, RankLimit(setup.ranks, clients)]
    if batches is None:
        setup.make_trainer([federator, *callbacks]).fit(setup.module, datamodule=data[0])
    else:
        trainer = setup.make_trainer([Gathering(), federator, *callbacks])
        random = [RandomState(seed, trainer.strategy.root_device) for seed in seeds]
        module = cached_stack(setup.module, len(starts))
        module.begin(random)
        trainer.fit(module, datamodule=StackedData(data, random, batches, trainer.max_epochs or 1))
    counters: Sequence[str] = getattr(setup.module, "counters", ())
    noted: State = {}
    for callback in callbacks:
        noted |= callback.state_dict()
    parts = [unstack(part, len(starts)) for part in (federator.trained, federator.kept_optimizer, noted)]
    for place, client_data in enumerate(data):
        trained, kept, of_callbacks = (part[place] for part in parts)
        for name in counters if place else ():
            trained[name] = trained[name] + starts[place].state[name] - first.state[name]
        yield End(
            trained,
            kept,
            of_callbacks,
            federator.steps[place],
            federator.losses[place],
            client_data.num_examples,
        )


def _finish(start: Start, end: End | None, setup: ClientSetup) -> tuple[Update | None, Memory]:
    """The update of a client, None where it drops out, and its new memory."""
    broadcast, memory, method, state, aux = (
        start.broadcast,
        start.memory,
        start.method,
        start.state,
        start.aux,
    )
    round_, client = broadcast.round, broadcast.client
    reference = start.reference if setup.codec.down else {}
    if end is None:
        model = setup.ranks.cut(client, {name: state[name] for name in setup.private})
        return None, {**memory, "model": model, "reference": reference}

    trained = end.trained
    reporting = [slice_ for slice_ in method.downlink if slice_ in broadcast.uplink]
    before, after = (
        setup.slices.parameters(setup.slices.select(reporting, values)) for values in (state, trained)
    )
    algorithm_memory = start.algorithm | end.algorithm
    aux_up, algorithm_memory = setup.algorithm.report(before, after, aux, algorithm_memory, end.steps)
    aux_up = setup.ranks.cut(client, setup.slices.auxiliary(reporting, aux_up))
    reported = setup.ranks.cut(client, setup.slices.select(broadcast.uplink, trained))
    state = setup.ranks.cut(client, state)
    if setup.privacy and setup.privacy.at_clients:
        reported, aux_up = setup.privacy.share(reported, aux_up, state, round_, client)

    images = 0 if setup.privacy else end.images
    loss = None if setup.privacy or setup.private_training else end.loss
    payloads, errors = {}, dict(memory.get("errors", {}))
    if setup.secure:
        weight = 1 if setup.privacy else setup.algorithm.weight(images)
        payloads = setup.secure.encode(
            broadcast.uplink, reported, state, aux_up, weight, loss, round_, client
        )
        images, loss = 0, None
    for slice_ in () if setup.secure else broadcast.uplink:
        values = setup.slices.select([slice_], reported)
        slice_errors = {name: errors[name] for name in values if name in errors}
        rng = stream(setup.seed, "uplink", round_, client, slice_)
        whose = f"slice {slice_} of client {client} in round {round_}"
        payloads[slice_], slice_errors = setup.codec.encode(values, state, slice_errors, rng, whose)
        errors |= slice_errors
    if aux_up and not setup.secure:
        payloads[AUX] = Payload.plain(aux_up)

    model = setup.ranks.cut(client, {name: trained[name] for name in setup.private})
    new_memory = {"model": model, "reference": reference, "optimizer": end.optimizer}
    new_memory |= {"algorithm": algorithm_memory, "errors": errors}
    update = Update(broadcast.cell, round_, client, images, loss, payloads)
    return update, new_memory


def evaluate(requests: Sequence[Evaluation], memories: Sequence[Memory], setup: ClientSetup) -> list[Scores]:
    """Hashes each client's own model, its private slices over the global ones; scores it on request.

    Args:
        requests: of one evaluation; all of them are to draw images, or none.
        memories: of the clients.
        setup: of the clients.
    """
    pairs = list(zip(requests, memories, strict=True))
    states = [
        setup.ranks.clear(
            request.client, {**setup.first, **_merge(request.payloads), **memory.get("model", {})}
        )
        for request, memory in pairs
    ]
    clients, first = [request.client for request in requests], requests[0]
    evaluated = setup.evaluate(states, first.round, clients) if first.draw else [({}, {})] * len(states)
    scores = []
    for client, state, (metrics, shown) in zip(clients, states, evaluated, strict=True):
        payloads = {name: Payload.plain(tensors) for name, tensors in shown.items()}
        scores.append(Scores(client, state_sha256(state), metrics, payloads))
    return scores


def _merge(payloads: dict[str, Payload]) -> State:
    """The tensors of all slices."""
    return {name: tensor for payload in payloads.values() for name, tensor in payload.tensors.items()}
