"""A client: its local update is a pure function of a broadcast, its memory and its data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from lightning import Callback, LightningModule, Trainer, seed_everything

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.codec import Codec
from fedlight.federation.federator import Federator, on_cpu
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.messages import AUX, Broadcast, Evaluation, Payload, Scores, State, Update
from fedlight.federation.method import Method
from fedlight.federation.slices import SliceMap
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.seeds import derive_seed, stream

Memory: TypeAlias = dict[str, State]
"""What a client keeps between rounds: `model` (private), `optimizer`, `algorithm`, `errors` (of encoding),
`reference` (the slices as they came down, where later ones come as deltas to them)."""

Evaluate: TypeAlias = Callable[[State, int, int], tuple[dict[str, float], dict[str, State]]]
"""Draws images from a model and scores them: (state_dict, round, client) -> metrics, tensors to show."""


@dataclass(frozen=True)
class ClientSetup:
    """What a client has from the start, the same in every round.

    Attributes:
        seed: of the federation; a local update draws from the stream (seed, round, client) alone.
        module: the client model with its first weights; the state is replaced before each use.
        slices: the slice map of the module.
        method: resolved over the slices.
        algorithm: what clients add to their training.
        codec: how reported slices are encoded.
        data: the data module of a client, by its number; it has `num_examples`.
        make_trainer: a fresh Trainer for one local update, from its callbacks.
        evaluate: draws from a model and scores it.
        rate: the factor of the optimizer's learning rate in a round.
        first: the first state_dict; the cell's seed decides it.
        privacy: client-level: what clips and blurs updates, and hides n_k; None where there is none.
        private_training: example-level: makes the callback that does so to a client's gradients, which is
            told by its number; None where there is none.
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
    privacy: GaussianMechanism | None = None
    private_training: Callable[[int], Callback] | None = None
    first: State = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", on_cpu(self.module.state_dict()))

    @cached_property
    def private(self) -> tuple[str, ...]:
        """The state_dict names that stay with a client after its first contact."""
        staying = [slice_ for slice_ in self.slices.names if slice_ not in self.method.downlink]
        return (*self.slices.private, *(name for slice_ in staying for name in self.slices.names[slice_]))

    @property
    def keeps_memory(self) -> bool:
        """Whether clients carry anything over from round to round."""
        encodes = self.codec.up or self.codec.down
        return bool(self.private or self.method.keep_optimizer or encodes or self.algorithm.keeps_memory)


def local_update(broadcast: Broadcast, memory: Memory, setup: ClientSetup) -> tuple[Update | None, Memory]:
    """Does what a broadcast asks for: E local epochs by a fresh Trainer, with the Federator inside it.

    Args:
        broadcast: of this round.
        memory: what the client kept in its last round; empty at first contact.
        setup: of the client.

    Returns:
        The update, or None where the client drops out; and its new memory.

    Raises:
        Diverged: the loss or the weights left the finite numbers.
    """
    state = {**setup.first, **memory.get("model", {}), **memory.get("reference", {})}
    for slice_, payload in broadcast.payloads.items():
        if slice_ != AUX:
            state |= setup.codec.down.values(payload, setup.slices.select([slice_], state))
    method = setup.method.in_round(broadcast.round, setup.slices.names)
    federated = setup.slices.select(method.downlink, state)
    reference = federated if setup.codec.down else {}
    if broadcast.drops_out:
        model = {name: state[name] for name in setup.private}
        return None, {**memory, "model": model, "reference": reference}

    round_, client = broadcast.round, broadcast.client
    aux = broadcast.payloads[AUX].tensors if AUX in broadcast.payloads else {}
    own = setup.slices.auxiliary(method.downlink, memory.get("algorithm", {}))
    kept_optimizer = memory.get("optimizer", {}) if setup.method.keep_optimizer else None

    seed_everything(derive_seed(setup.seed, "client", round_, client), verbose=False)
    frozen = setup.slices.select(method.freeze, state)
    federator = Federator(client, round_, state, kept_optimizer, setup.rate(round_), frozen)
    data = setup.data(client)
    added = setup.algorithm.callbacks(setup.slices.parameters(federated), aux, own)
    if setup.private_training:
        added = [setup.private_training(client), *added]
    setup.make_trainer([federator, *added]).fit(setup.module, datamodule=data)
    trained = federator.trained

    own = own | {name: tensor for callback in added for name, tensor in callback.state_dict().items()}
    reporting = [slice_ for slice_ in method.downlink if slice_ in broadcast.uplink]
    sent, after = (
        setup.slices.parameters(setup.slices.select(reporting, values)) for values in (state, trained)
    )
    reported, own = setup.algorithm.report(sent, after, aux, own, federator.steps)
    reported = setup.slices.auxiliary(reporting, reported)
    leaving = setup.slices.select(broadcast.uplink, trained)
    if setup.privacy and setup.privacy.at_clients:
        leaving, reported = setup.privacy.share(leaving, reported, state, round_, client)
    payloads, errors = {}, dict(memory.get("errors", {}))
    for slice_ in broadcast.uplink:
        values = setup.slices.select([slice_], leaving)
        lost = {name: errors[name] for name in values if name in errors}
        rng = stream(setup.seed, "uplink", round_, client, slice_)
        whose = f"slice {slice_} of client {client} in round {round_}"
        payloads[slice_], lost = setup.codec.encode(values, state, lost, rng, whose)
        errors |= lost
    if reported:
        payloads[AUX] = Payload.plain(reported)
    model = {name: trained[name] for name in setup.private}
    kept = {"model": model, "reference": reference, "optimizer": federator.kept_optimizer}
    kept |= {"algorithm": own, "errors": errors}
    images = 0 if setup.privacy else data.num_examples
    loss = None if setup.privacy or setup.private_training else federator.loss
    update = Update(broadcast.cell, round_, client, images, loss, payloads)
    return update, kept


def evaluate(request: Evaluation, memory: Memory, setup: ClientSetup) -> Scores:
    """Fingerprints the client's own model (private slices over the global ones); scores it if asked."""
    state = {**setup.first, **_merge(request.payloads), **memory.get("model", {})}
    metrics, shown = setup.evaluate(state, request.round, request.client) if request.draw else ({}, {})
    payloads = {name: Payload.plain(tensors) for name, tensors in shown.items()}
    return Scores(request.client, state_sha256(state), metrics, payloads)


def _merge(payloads: dict[str, Payload]) -> State:
    """The tensors of all slices."""
    return {name: tensor for payload in payloads.values() for name, tensor in payload.tensors.items()}
