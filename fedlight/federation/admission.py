"""The checks of messages from parties that nobody vouches for, before anything of them is kept.

`messages` holds the schema of a message; here stands what only its receiver knows: who was to send what. A
server checks updates and scores, a node checks broadcasts and evaluations. Each check raises Damaged with a
text that may repeat names out of the message: show it through `printable`.
"""

from collections.abc import Collection, Iterable, Mapping

import torch

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.codec import DELTA, Chain, Codec
from fedlight.federation.downlink import sent_slices
from fedlight.federation.messages import AUX, Broadcast, Evaluation, Payload, Scores, State, Update
from fedlight.federation.method import Method
from fedlight.federation.slices import SliceMap
from fedlight.runtime.errors import Damaged

MOST_EXAMPLES = 10**9  # images of one client, which bound its weight in the mean
LARGEST_COUNT = 2**53  # of a counter in a state_dict, to which clients add
LARGEST = 2.0**60  # magnitude of a value; the square of a difference of two stays finite in float32


def check_turn(
    update: Update, cell: str, round_: int, cohort: Collection[int], seen: Collection[int]
) -> None:
    """Checks that an update is of a client that is to report in this round.

    Args:
        update: as it arrived.
        cell: id of the federation.
        round_: the round under way.
        cohort: its clients.
        seen: those whose update is there already.

    Raises:
        Damaged: it is not.
    """
    if (update.cell, update.round) != (cell, round_) or update.client not in cohort:
        raise Damaged(f"is of no client of round {round_}")
    if update.client in seen:
        raise Damaged(f"came twice in round {round_}")


def check_update(
    update: Update, held: Mapping[str, State], aux_like: State, optional: bool, chain: Chain, private: bool
) -> None:
    """Checks what a client reports.

    Args:
        update: of a client whose turn it is.
        held: slice: its tensors as the client received them; of all slices that it is to report.
        extras_like: tensors like the auxiliary state that it is to report.
        optional: whether some of that state may be absent.
        chain: encodes the uplink.
        private: whether client-level privacy hides n_k and the loss.

    Raises:
        Damaged: it is not finite tensors of these names, shapes and dtypes, counts false numbers of
            parameters, or has numbers out of their range.
    """
    expected = {*held, AUX} if aux_like else {*held}
    if update.payloads.keys() != expected:
        raise Damaged(f"reports {_listed(update.payloads)} in place of {_listed(expected)}")
    for slice_, like in held.items():
        _check_slice(slice_, update.payloads[slice_], like, chain, [DELTA] if chain else [])
    if aux_like:
        _check_extras(update.payloads[AUX], aux_like, optional)
    fewest, most = (0, 0) if private else (1, MOST_EXAMPLES)
    if not fewest <= update.num_examples <= most:
        raise Damaged(f"says that it is of {update.num_examples} images, and {fewest} to {most} are allowed")
    if update.loss is not None and (private or not abs(update.loss) <= LARGEST):
        raise Damaged(f"has a loss of {update.loss:.3g}")


def check_scores(scores: Scores, request: Evaluation) -> None:
    """Checks a client's answer to an evaluation, as far as no evaluator is concerned.

    Raises:
        Damaged: it is of another client, scores what was not to be drawn, counts a false number of
            parameters, or has numbers that are not finite or too large.
    """
    if scores.client != request.client:
        raise Damaged(f"is of client {scores.client}")
    if not request.draw and (scores.metrics or scores.payloads):
        raise Damaged("scores images that were not to be drawn")
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
    """Checks what a server sends for a round.

    Args:
        broadcast: for this client.
        first: the first state_dict of the model.
        slices, method, codec, algorithm: of the cell.

    Raises:
        Damaged: it does not bring, in finite tensors of their names, shapes and dtypes, the slices that a
            client gets that last took part in the round `previous`; asks for a slice that does not leave the
            client in this round; or has auxiliary state that the algorithm does not send.
    """
    round_, previous = broadcast.round, broadcast.previous
    if broadcast.drops_out:
        raise Damaged("asks the client to drop out")
    if len(set(broadcast.uplink)) < len(broadcast.uplink):
        raise Damaged("names a slice of the uplink twice")
    expected = {*sent_slices(method, slices, codec, previous, round_)}
    if broadcast.payloads.keys() - {AUX} != expected:
        raise Damaged(f"brings {_listed(broadcast.payloads)} in place of {_listed(expected)}")
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
        _check_extras(broadcast.payloads[AUX], like, optional=True)


def check_evaluation(evaluation: Evaluation, first: State, slices: SliceMap) -> None:
    """Checks a server's request to evaluate the client's model.

    Raises:
        Damaged: it is not of the finite tensors of a whole global model.
    """
    if evaluation.payloads.keys() != slices.names.keys():
        raise Damaged(f"brings {_listed(evaluation.payloads)} in place of {_listed(slices.names)}")
    for slice_, payload in evaluation.payloads.items():
        _check_slice(slice_, payload, slices.select([slice_], first), Chain(), [])


def _follow(deltas: list[str], version: int, round_: int) -> bool:
    """Whether sorted names are those of the deltas of all rounds after `version` up to `round_`."""
    if len(deltas) != round_ - version:
        return False
    return deltas == [f"{DELTA}{number:06d}" for number in range(version + 1, round_ + 1)]


def _broadcast_like(algorithm: FedAvg, theta: State) -> State:
    """Tensors like all that an algorithm may send: at first, after a step, and after a lost memory."""
    before = algorithm.init(theta)
    _, after = algorithm.step(theta, theta, algorithm.aux_like(theta), before)
    states = before, after, algorithm.forget(after, 1)
    return {name: tensor for state in states for name, tensor in algorithm.broadcast(state).items()}


def _check_slice(slice_: str, payload: Payload, like: State, chain: Chain, deltas: Collection[str]) -> None:
    """Checks a slice: its values where there are no deltas, else these and what is sent uncompressed."""
    uncompressed = like.keys() - chain.encoded(like).keys()
    names = {*deltas, *uncompressed} if deltas else {*like}
    if odd := payload.tensors.keys() ^ names:
        name = min(odd)
        raise Damaged(f"has {'no' if name in names else 'a'} tensor {name} in slice {slice_}")
    _check_count(f"slice {slice_}", payload, like)
    try:
        values = chain.values(payload, like)
    except Damaged:
        raise
    except Exception as error:  # a transform may be a user's own
        raise Damaged(f"cannot be decoded ({type(error).__name__}: {error})") from error
    _check_like(values, like)


def _check_extras(payload: Payload, like: State, optional: bool) -> None:
    if odd := payload.tensors.keys() - like.keys():
        raise Damaged(f"has a tensor {min(odd)} in its auxiliary state")
    if (missing := like.keys() - payload.tensors.keys()) and not optional:
        raise Damaged(f"has no tensor {min(missing)} in its auxiliary state")
    _check_count("its auxiliary state", payload, payload.tensors)
    _check_like(payload.tensors, {name: like[name] for name in payload.tensors})


def _check_count(where: str, payload: Payload, like: State) -> None:
    """The receiver counts parameters by itself, and takes no false number for its ledger."""
    if payload.params != Payload.plain(like).params:
        raise Damaged(f"counts {payload.params} parameters in {where}")


def _check_like(values: State, like: State) -> None:
    """Checks tensors of the same names as others; whole numbers of more than one element must be the same."""
    for name, tensor in values.items():
        if (tensor.dtype, tensor.shape) != (like[name].dtype, like[name].shape):
            raise Damaged(
                f"has {name} of {tensor.dtype} and shape {tuple(tensor.shape)} in place of "
                f"{like[name].dtype} and {tuple(like[name].shape)}"
            )
        if tensor.is_floating_point() or tensor.numel() == 1:
            _check_magnitude(name, tensor)
        elif not torch.equal(tensor, like[name]):
            raise Damaged(f"changes the whole numbers of {name}")


def _check_magnitude(name: str, tensor: torch.Tensor) -> None:
    """Floating tensors are bounded, and so is a counter, which others add to, of a single element."""
    if not tensor.is_floating_point():
        room = tensor.numel() == 1 and tensor.dtype is not torch.bool
        if room and abs(int(tensor)) > min(LARGEST_COUNT, torch.iinfo(tensor.dtype).max // 2):
            raise Damaged(f"has a count of {int(tensor)} in {name}")
        return
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if not largest < float("inf"):
        raise Damaged(f"left the finite numbers in {name}")
    if largest > LARGEST:
        raise Damaged(f"has a value of {largest:.3g} in {name}, and {LARGEST:.3g} is the largest allowed")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
