"""The checks of untrusted messages, which run before any part of a message is kept.

`messages` defines the schema of a message. The checks here need the state of the receiver: which party was
to send which tensors in this round. A server checks updates and scores; a node checks broadcasts and
evaluations. Each check raises Damaged. Its text may repeat names from the message: print it by `printable`.
"""

from collections.abc import Collection, Iterable, Mapping

import torch

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.codec import DELTA, Chain, Codec
from fedlight.federation.downlink import sent_slices
from fedlight.federation.mechanism import check_norm, update_norm
from fedlight.federation.messages import AUX, Broadcast, Evaluation, Payload, Scores, State, Update
from fedlight.federation.method import Method
from fedlight.federation.slices import SliceMap
from fedlight.runtime.errors import Damaged

MOST_EXAMPLES = 10**9  # images of one client; bounds its weight in the mean
LARGEST_COUNT = 2**53  # of a counter in a state_dict, to which clients add
LARGEST = 2.0**60  # magnitude of a value; the squared difference of two values is finite in float32


def check_turn(
    update: Update, cell: str, round_: int, cohort: Collection[int], received: Collection[int]
) -> None:
    """Checks that an update is the first of a client of the open round.

    Args:
        update: as it arrived.
        cell: id of the federation.
        round_: the open round, 1..R.
        cohort: its clients.
        received: the clients whose update of this round has arrived already.

    Raises:
        Damaged: the update is of another federation, round or client, or the second of this client.
    """
    if (update.cell, update.round) != (cell, round_) or update.client not in cohort:
        raise Damaged(f"is of no client of round {round_}")
    if update.client in received:
        raise Damaged(f"came twice in round {round_}")


def check_update(
    update: Update,
    received: Mapping[str, State],
    aux_like: State,
    optional: bool,
    chain: Chain,
    private: bool,
) -> None:
    """Checks the content of one untrusted update.

    Args:
        update: of a client that `check_turn` accepts.
        received: slice: its tensors as the client received them; of all slices that it is to report.
        aux_like: tensors like the auxiliary state that the client is to report.
        optional: whether some of that state may be absent.
        chain: encodes the uplink.
        private: whether client-level privacy hides n_k and the loss.

    Raises:
        Damaged: the update is not of finite tensors with these names, shapes and dtypes, states wrong numbers
            of parameters, or has numbers out of their range.
    """
    expected = {*received, AUX} if aux_like else {*received}
    if update.payloads.keys() != expected:
        raise Damaged(f"reports {_format_names(update.payloads)} instead of {_format_names(expected)}")
    for slice_, like in received.items():
        _check_slice(slice_, update.payloads[slice_], like, chain, [DELTA] if chain else [])
    if aux_like:
        _check_aux(update.payloads[AUX], aux_like, optional)
    fewest, most = (0, 0) if private else (1, MOST_EXAMPLES)
    if not fewest <= update.num_examples <= most:
        raise Damaged(f"reports {update.num_examples} training images; {fewest} to {most} are allowed")
    if update.loss is not None and (private or not abs(update.loss) <= LARGEST):
        raise Damaged(f"has a loss of {update.loss:.3g}")


def check_private_update(values: State, aux: State, theta: State, aux_like: State) -> None:
    """Checks the decoded tensors of one untrusted update under client-level privacy, before it is clipped.

    Args:
        values: of the slices.
        aux: auxiliary state of the algorithm.
        theta: the slices of the global model that are reported.
        aux_like: tensors like the auxiliary state that is reported.

    Raises:
        Damaged: names, shapes or dtypes differ, or the norm of the update is not finite.
    """
    check_private_tensors(values, aux, theta, aux_like)
    check_norm(update_norm(values, theta, aux))


def check_private_tensors(values: State, aux: State, theta: State, aux_like: State) -> None:
    """The checks of `check_private_update` but that of the norm.

    Raises:
        Damaged: names, shapes or dtypes differ.
    """
    for tensors, like in ((values, theta), (aux, aux_like)):
        if _shapes(tensors) != _shapes(like):
            raise Damaged("does not have the tensors that are to be reported")


def _shapes(tensors: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def check_scores(scores: Scores, request: Evaluation) -> None:
    """Checks an untrusted answer to an evaluation; the evaluator's own check is a separate one.

    Raises:
        Damaged: the answer is of another client, has scores though no images were requested, states wrong
            numbers of parameters, or has numbers that are not finite or too large.
    """
    if scores.client != request.client:
        raise Damaged(f"is of client {scores.client}")
    if not request.draw and (scores.metrics or scores.payloads):
        raise Damaged("has scores of images, and no images were requested")
    for name, value in scores.metrics.items():
        if not abs(value) <= LARGEST:
            raise Damaged(f"has a {name} of {value:.3g}")
    for name, payload in scores.payloads.items():
        _check_count(name, payload, payload.tensors)
        for tensor in payload.tensors.values():
            _check_magnitude(name, tensor)


def check_broadcast(
    broadcast: Broadcast, first: State, slices: SliceMap, method: Method, codec: Codec, algorithm: FedAvg
) -> None:
    """Checks the content of an untrusted broadcast at a node.

    Args:
        broadcast: for this client.
        first: the first state_dict of the model.
        slices, method, codec, algorithm: of the cell.

    Raises:
        Damaged: the broadcast is not of finite tensors with the names, shapes and dtypes of the slices that a
            client receives which last took part in the round `previous`; or it tells the client to drop out,
            names a slice of the uplink twice, or has auxiliary state that the algorithm does not send.
    """
    round_, previous = broadcast.round, broadcast.previous
    if broadcast.drops_out:
        raise Damaged("tells the client to drop out")
    if len(set(broadcast.uplink)) < len(broadcast.uplink):
        raise Damaged("names a slice of the uplink twice")
    expected = {*sent_slices(method, slices, codec, previous, round_)}
    if broadcast.payloads.keys() - {AUX} != expected:
        raise Damaged(f"contains {_format_names(broadcast.payloads)} instead of {_format_names(expected)}")
    version = previous or int(codec.seeded_start)
    for slice_ in expected:
        payload = broadcast.payloads[slice_]
        deltas = sorted(name for name in payload.tensors if name.startswith(DELTA))
        if deltas and not (codec.down and version and _follow(deltas, version, round_)):
            raise Damaged(f"has deltas of slice {slice_} that do not lead from round {version} to {round_}")
        _check_slice(slice_, payload, slices.select([slice_], first), codec.down, deltas)
    if AUX in broadcast.payloads:
        exchanged = method.in_round(round_, slices.names).downlink
        theta = slices.parameters(slices.select(exchanged, first))
        like = slices.auxiliary(exchanged, _broadcast_like(algorithm, theta))
        _check_aux(broadcast.payloads[AUX], like, optional=True)


def check_evaluation(evaluation: Evaluation, first: State, slices: SliceMap) -> None:
    """Checks an untrusted request to evaluate the client's model, at a node.

    Raises:
        Damaged: the request is not of the finite tensors of all slices of the global model.
    """
    if evaluation.payloads.keys() != slices.names.keys():
        raise Damaged(
            f"contains {_format_names(evaluation.payloads)} instead of {_format_names(slices.names)}"
        )
    for slice_, payload in evaluation.payloads.items():
        _check_slice(slice_, payload, slices.select([slice_], first), Chain(), [])


def _follow(deltas: list[str], version: int, round_: int) -> bool:
    """Whether sorted names are those of the deltas of the rounds `version` + 1 to `round_`."""
    if len(deltas) != round_ - version:
        return False
    return deltas == [f"{DELTA}{number:06d}" for number in range(version + 1, round_ + 1)]


def _broadcast_like(algorithm: FedAvg, theta: State) -> State:
    """Tensors like the auxiliary state of a broadcast: at first, after a step, and after a lost memory."""
    before = algorithm.init(theta)
    _, after = algorithm.step(theta, theta, algorithm.aux_like(theta), before)
    states = before, after, algorithm.forget(after, 1)
    return {name: tensor for state in states for name, tensor in algorithm.broadcast(state).items()}


def _check_slice(slice_: str, payload: Payload, like: State, chain: Chain, deltas: Collection[str]) -> None:
    """Checks the payload of a slice: plain values, or deltas with these names and uncompressed tensors."""
    uncompressed = like.keys() - chain.encoded(like).keys()
    names = {*deltas, *uncompressed} if deltas else {*like}
    if differing := payload.tensors.keys() ^ names:
        name = min(differing)
        raise Damaged(f"has {'no' if name in names else 'a'} tensor {name} in slice {slice_}")
    _check_count(f"slice {slice_}", payload, like)
    try:
        values = chain.values(payload, like)
    except Damaged:
        raise
    except Exception as error:  # a transform may be user code
        raise Damaged(f"cannot be decoded ({type(error).__name__}: {error})") from error
    _check_like(values, like)


def _check_aux(payload: Payload, like: State, optional: bool) -> None:
    if unknown := payload.tensors.keys() - like.keys():
        raise Damaged(f"has a tensor {min(unknown)} in its auxiliary state")
    if (missing := like.keys() - payload.tensors.keys()) and not optional:
        raise Damaged(f"has no tensor {min(missing)} in its auxiliary state")
    _check_count("its auxiliary state", payload, payload.tensors)
    _check_like(payload.tensors, {name: like[name] for name in payload.tensors})


def _check_count(where: str, payload: Payload, like: State) -> None:
    """Checks the stated number of parameters, which the ledger counts, against the receiver's own."""
    if payload.params != (expected := Payload.plain(like).params):
        raise Damaged(f"states {payload.params} parameters in {where}, which has {expected}")


def _check_like(values: State, like: State) -> None:
    """Checks shapes, dtypes and values; an integer tensor of several elements must equal that of `like`."""
    for name, tensor in values.items():
        if (tensor.dtype, tensor.shape) != (like[name].dtype, like[name].shape):
            raise Damaged(
                f"has {name} of {tensor.dtype} and shape {tuple(tensor.shape)} instead of "
                f"{like[name].dtype} and {tuple(like[name].shape)}"
            )
        if tensor.is_floating_point() or tensor.numel() == 1:
            _check_magnitude(name, tensor)
        elif not torch.equal(tensor, like[name]):
            raise Damaged(f"changes the integers of {name}")


def _check_magnitude(name: str, tensor: torch.Tensor) -> None:
    """Checks the magnitude of a floating tensor, or of a counter (one integer), to which clients add."""
    if not tensor.is_floating_point():
        counter = tensor.numel() == 1 and tensor.dtype is not torch.bool
        if counter and abs(int(tensor)) > min(LARGEST_COUNT, torch.iinfo(tensor.dtype).max // 2):
            raise Damaged(f"has a count of {int(tensor)} in {name}")
        return
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if not largest < float("inf"):
        raise Damaged(f"has values that are not finite in {name}")
    if largest > LARGEST:
        raise Damaged(f"has a value of {largest:.3g} in {name}; {LARGEST:.3g} is the largest allowed")


def _format_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
