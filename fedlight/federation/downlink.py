"""The downlink: the slices as clients receive them, as values or as encoded differences."""

from collections.abc import Iterable

from fedlight.federation.codec import DELTA, Codec
from fedlight.federation.messages import Payload, State
from fedlight.federation.method import Method
from fedlight.federation.slices import SliceMap
from fedlight.runtime.seeds import stream


class Downlink:
    """Encodes the slices that the server sends.

    Without a chain the values are sent. With it the server keeps the reference: the downlink slices as the
    clients of the last round decoded them. In each round the encoded difference between the global model and
    the reference is sent, and both sides add it to the reference; the global model is the reference from then
    on. The error of an encoding is discarded: clients train from a model without it and correct it by
    training, so that with error feedback it would count twice. A client that was absent receives every
    difference that it missed, or the values of the reference where these are fewer bytes.

    Args:
        method: resolved over the slices.
        slices: the slice map of the model.
        initial: the first state_dict; where `codec.seeded_start`, clients make it from the seed.
        codec: has the chain.
        seed: of the federation.
    """

    def __init__(self, method: Method, slices: SliceMap, initial: State, codec: Codec, seed: int) -> None:
        self._method = method
        self._slices = slices
        self._initial = initial
        self._codec = codec
        self._seed = seed

    def reset(self) -> None:
        """Returns to the state before the first round."""
        self._reference = self._slices.select(self._slices.names, self._initial)
        self._deltas: State = {}  # `slice/delta/round`: encoded
        self._round = 0

    def advance(self, round_: int, theta: State) -> State:
        """Moves the reference to the global model, for the clients of a round.

        Returns:
            The global model as these clients will decode it.
        """
        self._round = round_
        if not self._codec.down:
            self._reference = dict(theta)
        elif round_ > 1:
            sent = self._sent(round_ - 1)
            for slice_ in sent:
                self._encode(slice_, self._slices.select([slice_], theta))
            return {**theta, **self._slices.select(sent, self._reference)}
        return theta

    def payloads(self, previous: int) -> dict[str, Payload]:
        """The payloads for a client that last took part in the round `previous`, 0 for never."""
        version = previous or int(self._codec.seeded_start)  # the seed gives what round 1 would send
        sent = sent_slices(self._method, self._slices, self._codec, previous, self._round)
        return {slice_: self._payload(slice_, version) for slice_ in sent}

    def received(self, slice_: str) -> State:
        """A slice as the clients of this round received it."""
        return self._slices.select([slice_], self._reference)

    def state(self) -> dict[str, State]:
        """Groups of tensors for the checkpoint."""
        return {"reference": self._reference, "deltas": self._deltas} if self._codec.down else {}

    def restore(self, groups: dict[str, State]) -> None:
        """The inverse of `state`."""
        self.reset()
        if self._codec.down:
            self._reference, self._deltas = groups["reference"], groups.get("deltas", {})

    def _sent(self, version: int) -> Iterable[str]:
        """The slices that are sent to a client whose reference is of the round `version`."""
        return self._slices.names if self._method.sends_all(version) else self._method.downlink

    def _encode(self, slice_: str, values: State) -> None:
        chain, reference = self._codec.down, self.received(slice_)
        rng = stream(self._seed, "downlink", self._round, slice_)
        content = chain.encode(
            chain.difference(values, reference), rng, f"slice {slice_} of the server in round {self._round}"
        )
        name = f"{DELTA}{self._round:06d}"
        self._reference |= chain.values(chain.payload(values, {name: content}), reference)
        self._deltas[f"{slice_}/{name}"] = content
        missed = self._missed(slice_, 0)
        while sum(map(len, missed.values())) >= Payload.plain(reference).bytes:  # the values are cheaper
            oldest = min(missed)
            del missed[oldest], self._deltas[f"{slice_}/{oldest}"]

    def _payload(self, slice_: str, version: int) -> Payload:
        """A slice for a client whose reference is of the round `version`, 0 for none."""
        reference = self.received(slice_)
        missed = self._missed(slice_, version)
        if version and len(missed) == self._round - version:
            return self._codec.down.payload(reference, missed)
        return Payload.plain(reference)

    def _missed(self, slice_: str, version: int) -> State:
        """The encoded deltas of a slice after the round `version`."""
        prefix = f"{slice_}/{DELTA}"
        return {
            name.removeprefix(f"{slice_}/"): delta
            for name, delta in self._deltas.items()
            if name.startswith(prefix) and int(name.removeprefix(prefix)) > version
        }


def sent_slices(method: Method, slices: SliceMap, codec: Codec, previous: int, round_: int) -> Iterable[str]:
    """The slices that a client receives in a round.

    Args:
        method: resolved over the slices.
        slices: the slice map of the model.
        codec: says whether the first model comes from the seed.
        previous: the round in which the client last took part, 0 for never.
        round_: the open round, 1..R.
    """
    version = previous or int(codec.seeded_start)
    if version and round_ == 1:
        return ()
    return slices.names if method.sends_all(version) else method.downlink
