"""The downlink: the slices as clients hold them, and what each client needs to hold them so."""

from collections.abc import Iterable

from fedlight.federation.codec import DELTA, Codec
from fedlight.federation.messages import Payload, State
from fedlight.federation.method import Method
from fedlight.federation.slices import SliceMap
from fedlight.runtime.seeds import stream


class Downlink:
    """What the server sends of the global model.

    Without a chain the values cross. With it the server keeps the reference: the downlink slices as the
    clients of the last round decoded them. In each round the encoded difference between the global model and
    the reference crosses, and is added to the reference by both sides; the global model is the reference from
    then on. What an encoding lost is forgotten: clients train from a model without it and make up for it by
    themselves, so that with error feedback it would count twice. A client that was away gets every difference
    that it missed, or the values of the reference where these are fewer bytes.

    Args:
        method: resolved over the slices.
        slices: the slice map of the model.
        initial: the first state_dict, which a client has by itself where `codec.seeded_start`.
        codec: has the chain.
        seed: of the federation.
    """

    def __init__(self, method: Method, slices: SliceMap, initial: State, codec: Codec, seed: int) -> None:
        self._method = method
        self._slices = slices
        self._initial = initial
        self._codec = codec
        self._seed = seed

    def begin(self) -> None:
        """Puts it before the first round."""
        self._reference = self._slices.select(self._slices.names, self._initial)
        self._deltas: State = {}  # `slice/delta/round`: encoded
        self._round = 0

    def open(self, round_: int, theta: State) -> State:
        """Brings the reference to the global model, for the clients of this round.

        Returns:
            The global model as they will hold it.
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
        """What a client of this round gets, which last took part in the round `previous`, 0 for never."""
        version = previous or int(self._codec.seeded_start)  # from the seed it has what round 1 would send
        sent = sent_slices(self._method, self._slices, self._codec, previous, self._round)
        return {slice_: self._payload(slice_, version) for slice_ in sent}

    def held(self, slice_: str) -> State:
        """A slice as the clients of this round hold it."""
        return self._slices.select([slice_], self._reference)

    def state(self) -> dict[str, State]:
        """For the checkpoint."""
        return {"reference": self._reference, "deltas": self._deltas} if self._codec.down else {}

    def restore(self, groups: dict[str, State]) -> None:
        """The inverse of `state`."""
        self.begin()
        if self._codec.down:
            self._reference, self._deltas = groups["reference"], groups.get("deltas", {})

    def _sent(self, version: int) -> Iterable[str]:
        """The slices that go down to a client whose reference is of the round `version`."""
        return self._slices.names if self._method.whole_down(version) else self._method.downlink

    def _encode(self, slice_: str, values: State) -> None:
        chain, held = self._codec.down, self.held(slice_)
        rng = stream(self._seed, "downlink", self._round, slice_)
        content = chain.encode(
            chain.difference(values, held), rng, f"slice {slice_} of the server in round {self._round}"
        )
        name = f"{DELTA}{self._round:06d}"
        self._reference |= chain.values(chain.payload(values, {name: content}), held)
        self._deltas[f"{slice_}/{name}"] = content
        missed = self._missed(slice_, 0)
        while sum(map(len, missed.values())) >= Payload.plain(held).bytes:  # the values are cheaper
            oldest = min(missed)
            del missed[oldest], self._deltas[f"{slice_}/{oldest}"]

    def _payload(self, slice_: str, version: int) -> Payload:
        """A slice for a client whose reference is of the round `version`, 0 for none."""
        held = self.held(slice_)
        missed = self._missed(slice_, version)
        if version and len(missed) == self._round - version:
            return self._codec.down.payload(held, missed)
        return Payload.plain(held)

    def _missed(self, slice_: str, version: int) -> State:
        """The encoded deltas of a slice after the round `version`."""
        begin = f"{slice_}/"
        found = {
            name.removeprefix(begin): delta for name, delta in self._deltas.items() if name.startswith(begin)
        }
        return {name: delta for name, delta in found.items() if int(name.removeprefix(DELTA)) > version}


def sent_slices(method: Method, slices: SliceMap, codec: Codec, previous: int, round_: int) -> Iterable[str]:
    """The slices that go down in a round to a client.

    Args:
        method: resolved over the slices.
        slices: the slice map of the model.
        codec: names the start and the chain of the downlink.
        previous: the round in which the client last took part, 0 for never.
        round_: the round under way.
    """
    version = previous or int(codec.seeded_start)
    if version and round_ == 1:
        return ()
    return slices.names if method.whole_down(version) else method.downlink
