"""A client's part in secure aggregation: its keys, the shares that it gives and holds, its masked update.

The steps of a round (Bonawitz et al. 2017, figure 4); each message names cell, round and client:

1. After training, `keys`: two public keys, and a commitment to the seed of each slice's own mask.
2. On `key list`, the keys of all clients that trained: `shares`, for each other client the encrypted shares
   of the mask key and of the seeds.
3. On `share list`, the encrypted shares for this client: the masked update.
4. On `survivors`, the clients whose masked update arrived: `revealed`, a share of the seeds of each survivor,
   and of the mask key of each client that has not survived; never both of one client.

Secrets are in memory alone and last one round: a client whose process ends drops out of the round.
"""

import secrets
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedlight.federation.messages import MaskMessage, MaskStep, Payload, Update
from fedlight.federation.secure.integers import pack_integers, unpack_integers
from fedlight.federation.secure.mask_bytes import (
    HEAD_BYTES,
    KEY_BYTES,
    KEYS_BYTES,
    PLACE_BYTES,
    SHARE_BYTES,
    token_bytes,
)
from fedlight.federation.secure.masks import (
    KeyPair,
    bytes_payload,
    check_share,
    commit,
    expand,
    open_payload,
    pair_mask,
    seal,
    share,
    transcript,
    unseal,
)
from fedlight.federation.secure.secure_sum import INTEGERS, STATISTICS, SecureAggregation
from fedlight.federation.secure.sum_sizes import fewest_that_unmask
from fedlight.runtime.errors import Damaged


@dataclass
class MaskSession:
    """The secrets and shares of one round.

    Attributes:
        update: of this client, not masked.
        planned: client: the slices that it is to report in the round.
        keys: of masks and of encryption.
        seeds: slice: seed of this client's own mask.
        step: the message that comes next.
        public: client: the public keys of those that trained.
        session: the transcript of the round.
        held: client: the shares of its key and of its seeds that this client holds.
    """

    update: Update
    planned: dict[int, tuple[str, ...]]
    keys: tuple[KeyPair, KeyPair]
    seeds: dict[str, bytes]
    step: MaskStep = "key list"
    public: dict[int, bytes] = field(default_factory=dict)
    session: bytes = b""
    held: dict[int, tuple[bytes, dict[str, bytes]]] = field(default_factory=dict)

    @property
    def places(self) -> dict[int, int]:
        """Client: its place among those that trained."""
        return {client: place for place, client in enumerate(sorted(self.public))}


class MaskClient:
    """Takes part in the masking of one round after another.

    Args:
        secure: encodes updates, and has the rules of sums.
        client: its number.
    """

    def __init__(self, secure: SecureAggregation, client: int) -> None:
        self._secure = secure
        self._client = client
        self._current: MaskSession | None = None

    def begin(self, update: Update, planned: dict[int, tuple[str, ...]]) -> MaskMessage:
        """Begins the masking of an update with new keys; earlier ones are forgotten.

        Args:
            update: of a round, not masked.
            planned: client: the slices that it is to report in the round.
        """
        keys = KeyPair(), KeyPair()
        seeds = {slice_: secrets.token_bytes(KEY_BYTES) for slice_ in update.payloads}
        self._current = MaskSession(update, planned, keys, seeds)
        payloads = {
            "keys": bytes_payload({"own": keys[0].public + keys[1].public}),
            "commitments": bytes_payload({slice_: commit(seed) for slice_, seed in seeds.items()}),
        }
        return self._message("keys", payloads)

    def answer(self, message: MaskMessage) -> MaskMessage | Update:
        """Answers the next message of the server.

        Raises:
            Damaged: the message is of another round or step, or has other content than an honest server's.
        """
        current = self._open(message)
        answer: MaskMessage | Update
        if current.step == "key list":
            answer, current.step = self._share(current, message), "share list"
        elif current.step == "share list":
            answer, current.step = self._mask(current, message), "survivors"
        else:
            answer, self._current = self._reveal(current, message), None
        return answer

    def _open(self, message: MaskMessage) -> MaskSession:
        """The session of a message."""
        current = self._current
        if current is None or message.round != current.update.round:
            raise Damaged(f"round {message.round} has no masks at this client, which may have been restarted")
        if message.step != current.step:
            raise Damaged(f"the server sends the {message.step}, and the {current.step} comes next")
        expected = {"key list": "keys", "share list": "shares", "survivors": "clients"}[message.step]
        if message.payloads.keys() != {expected}:
            raise Damaged(f"the {message.step} has other payloads than {expected}")
        return current

    def _share(self, current: MaskSession, message: MaskMessage) -> MaskMessage:
        public = self._read_keys(current, message)
        current.public = public
        current.session = transcript(message.cell, message.round, public)
        threshold = self._threshold(current)
        if len(public) < threshold:
            raise Damaged(f"{len(public)} clients have keys, and {threshold} are needed to unmask")
        shares = [
            share(secret, threshold, len(public))
            for secret in (current.keys[0].secret, *current.seeds.values())
        ]
        tokens = {}
        for client, place in current.places.items():
            own = [shared[place] for shared in shares]
            if client == self._client:
                current.held[client] = own[0], dict(zip(current.seeds, own[1:], strict=True))
                continue
            head = _head(message.round, self._client, client)
            tokens[str(client)] = seal(self._cipher_key(current, client), head + b"".join(own))
        return self._message("shares", {"shares": bytes_payload(tokens)})

    def _read_keys(self, current: MaskSession, message: MaskMessage) -> dict[int, bytes]:
        listed = message.payloads["keys"]
        names = {str(client): client for client in current.planned}
        if unknown := listed.tensors.keys() - names.keys():
            raise Damaged(f"the key list has {min(unknown)}, which is no client of round {message.round}")
        contents = open_payload(listed, dict.fromkeys(listed.tensors, KEYS_BYTES))
        public = {names[name]: content for name, content in contents.items()}
        halves = [half for key in public.values() for half in (key[:KEY_BYTES], key[KEY_BYTES:])]
        if len(set(halves)) < len(halves):
            raise Damaged("the key list has a key twice")
        if public.get(self._client) != current.keys[0].public + current.keys[1].public:
            raise Damaged("the key list has other keys of this client than it sent")
        return public

    def _mask(self, current: MaskSession, message: MaskMessage) -> Update:
        names = {str(client): client for client in current.public if client != self._client}
        listed = message.payloads["shares"]
        if unknown := listed.tensors.keys() - names.keys():
            raise Damaged(f"the share list has {min(unknown)}, which is no other client with keys")
        sizes = {name: token_bytes(len(current.planned[names[name]])) for name in listed.tensors}
        held = {self._client: current.held[self._client]}
        for name, token in open_payload(listed, sizes).items():
            held[names[name]] = self._read_shares(current, message.round, names[name], token)
        current.held = held
        if len(held) < (threshold := self._threshold(current)):
            raise Damaged(f"{len(held)} clients sent shares, and {threshold} are needed to unmask")
        payloads = {
            slice_: self._mask_slice(current, slice_, payload)
            for slice_, payload in current.update.payloads.items()
        }
        return replace(current.update, payloads=payloads)

    def _read_shares(
        self, current: MaskSession, round_: int, sender: int, token: bytes
    ) -> tuple[bytes, dict[str, bytes]]:
        try:
            plain = unseal(self._cipher_key(current, sender), token)
        except Damaged as error:
            raise Damaged(f"the shares of client {sender} cannot be decrypted") from error
        uplink, place = current.planned[sender], current.places[self._client]
        if plain[:HEAD_BYTES] != _head(round_, sender, self._client):
            raise Damaged(f"the shares of client {sender} are those of another round or client")
        if len(plain) != HEAD_BYTES + SHARE_BYTES * (1 + len(uplink)):
            raise Damaged(f"client {sender} has sent {len(plain)} bytes of shares")
        starts = range(HEAD_BYTES, len(plain), SHARE_BYTES)
        key, *seeds = (check_share(plain[start : start + SHARE_BYTES], place) for start in starts)
        return key, dict(zip(uplink, seeds, strict=True))

    def _mask_slice(self, current: MaskSession, slice_: str, payload: Payload) -> Payload:
        """The vector of a slice, with the client's own mask and one for each other client that reports it."""
        bits, count = self._secure.fixed.modulus_bits, STATISTICS + payload.params
        total = expand(current.seeds[slice_], count, bits)
        for client in current.held:
            if client != self._client and slice_ in current.planned[client]:
                public = current.public[client][:KEY_BYTES]
                pair = (self._client, client)
                total = total + pair_mask(current.keys[0], public, pair, current.session, slice_, count, bits)
        total = total + unpack_integers(payload.tensors[INTEGERS], bits, count)
        return Payload({INTEGERS: pack_integers(total, bits)}, payload.params)

    def _reveal(self, current: MaskSession, message: MaskMessage) -> MaskMessage:
        survivors = read_survivors(message, {*current.held})
        if len(survivors) < (threshold := self._threshold(current)):
            raise Damaged(f"{len(survivors)} clients survive, and {threshold} are needed to unmask")
        if self._client not in survivors:
            raise Damaged("the survivors are without this client, which has sent its masked update")
        summed = self._secure.summed_slices(current.planned, survivors)
        seeds = {
            f"{client}.{slice_}": content
            for client in sorted(survivors)
            for slice_, content in current.held[client][1].items()
            if slice_ in summed
        }
        keys = {str(client): current.held[client][0] for client in sorted(current.held.keys() - survivors)}
        return self._message("revealed", {"seeds": bytes_payload(seeds), "keys": bytes_payload(keys)})

    def _cipher_key(self, current: MaskSession, client: int) -> bytes:
        low, high = sorted((self._client, client))
        return current.keys[1].agree(current.public[client][KEY_BYTES:], "shares", current.session, low, high)

    def _threshold(self, current: MaskSession) -> int:
        return fewest_that_unmask(self._secure.threshold, len(current.planned))

    def _message(self, step: MaskStep, payloads: dict[str, Payload]) -> MaskMessage:
        assert self._current
        update = self._current.update
        return MaskMessage(update.cell, update.round, self._client, step, payloads)


def read_survivors(message: MaskMessage, known: set[int]) -> set[int]:
    """The survivors that an untrusted message lists.

    Raises:
        Damaged: it lists others than known clients, or one twice.
    """
    payload = message.payloads["clients"]
    tensor = payload.tensors.get("survivors")
    if payload.params or payload.tensors.keys() != {"survivors"} or tensor is None:
        raise Damaged("the survivors are no list of clients")
    if tensor.dtype is not torch.int32 or tensor.dim() != 1:
        raise Damaged("the survivors are no list of clients")
    listed = tensor.tolist()
    if len(set(listed)) < len(listed) or not known.issuperset(listed):
        raise Damaged("the survivors are others than the clients that have sent shares")
    return set(listed)


def _head(round_: int, sender: int, receiver: int) -> bytes:
    return np.array([round_, sender, receiver], "<u4").tobytes()[: 3 * PLACE_BYTES]
