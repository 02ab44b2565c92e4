"""A client's part in secure aggregation: its keys, the shares that it gives and holds, its masked update.

The steps of a round (Bonawitz et al. 2017, figure 4); each message names cell, round and client:

1. After training, `keys`: two public keys and a hash of the received model, signed where the agreement lists
   nodes' keys, and a commitment to the seed of its own mask. Slices that the same clients report are a group
   with one mask, and one seed.
2. On `key list`, the keys of all clients that trained, who must have received the same model: `shares`, for
   each other client the encrypted shares of the mask key and of the seeds.
3. On `share list`, the encrypted shares for this client: the masked update.
4. On `survivors`, the clients whose masked update arrived: `revealed`, a share of the seeds of each survivor,
   and of the mask key of each client that has not survived; never both of one client.

Secrets are in memory alone and last one round: a client whose process ends drops out of the round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedlight.federation.messages import MaskMessage, MaskStep, Payload, Update
from fedlight.federation.secure.integers import pack_integers, split_by, unpack_integers
from fedlight.federation.secure.mask_bytes import (
    HEAD_BYTES,
    PLACE_BYTES,
    SHARE_BYTES,
    keys_bytes,
    token_bytes,
)
from fedlight.federation.secure.masks import (
    KeyPair,
    bytes_payload,
    check_share,
    commit,
    hash_of_model,
    new_secret,
    open_payload,
    own_mask,
    pair_mask,
    seal,
    share,
    split_keys,
    transcript,
    unseal,
)
from fedlight.federation.secure.secure_sum import INTEGERS, STATISTICS, SecureAggregation
from fedlight.federation.secure.signatures import Signer, signed_content
from fedlight.federation.secure.sum_sizes import fewest_that_unmask, group_slices, groups_of
from fedlight.runtime.errors import Damaged


@dataclass
class MaskSession:
    """The secrets and shares of one round.

    Attributes:
        update: of this client, not masked.
        planned: client: the slices that it is to report in the round.
        keys: of masks and of encryption.
        seeds: group of slices: seed of this client's own mask.
        own: the public keys, the hash and the signature, as they left.
        step: the message that comes next.
        public: client: the public keys of those that trained.
        session: the transcript of the round.
        held: client: the shares of its key and of its seeds that this client holds.
    """

    update: Update
    planned: dict[int, tuple[str, ...]]
    keys: tuple[KeyPair, KeyPair]
    seeds: dict[str, bytes]
    own: bytes
    step: MaskStep = "key list"
    public: dict[int, bytes] = field(default_factory=dict)
    session: bytes = b""
    held: dict[int, tuple[bytes, dict[str, bytes]]] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The groups of slices of the round."""
        return group_slices(self.planned)

    def groups_of(self, client: int) -> list[str]:
        """The groups that a client is to report, in the order of its seeds."""
        return groups_of(self.groups, self.planned[client])

    @property
    def places(self) -> dict[int, int]:
        """Client: its place among those that trained."""
        return {client: place for place, client in enumerate(sorted(self.public))}


class MaskClient:
    """Takes part in the masking of one round after another.

    Args:
        secure: encodes updates, and has the rules of sums.
        client: its number.
        signer: signs its public keys; None where the agreement lists no keys of nodes.
    """

    def __init__(self, secure: SecureAggregation, client: int, signer: Signer | None = None) -> None:
        self._secure = secure
        self._client = client
        self._signer = signer
        self._current: MaskSession | None = None

    def begin(self, update: Update, planned: dict[int, tuple[str, ...]], model: bytes) -> MaskMessage:
        """Begins the masking of an update with new keys; earlier ones are forgotten.

        Args:
            update: of a round, not masked.
            planned: client: the slices that it is to report in the round.
            model: SHA-256 of what the server sent.
        """
        keys = KeyPair(), KeyPair()
        groups = groups_of(group_slices(planned), update.payloads)
        seeds = {group: new_secret() for group in groups}
        public = keys[0].public + keys[1].public + model
        if self._signer:
            public += self._signer.sign(signed_content(update.cell, update.round, self._client, public))
        self._current = MaskSession(update, planned, keys, seeds, own=public)
        payloads = {
            "keys": bytes_payload({"own": public}),
            "commitments": bytes_payload({group: commit(seed) for group, seed in seeds.items()}),
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
        size = keys_bytes(self._secure.signers is not None)
        contents = open_payload(listed, dict.fromkeys(listed.tensors, size))
        public = {names[name]: content for name, content in contents.items()}
        halves = [half for content in public.values() for half in split_keys(content)]
        if len(set(halves)) < len(halves):
            raise Damaged("the key list has a key twice")
        if public.get(self._client) != current.own:
            raise Damaged("the key list has other keys of this client than it sent")
        for client, content in sorted(public.items()):
            try:
                self._secure.check_keys(message.cell, message.round, client, content)
            except Damaged as error:
                raise Damaged(f"in the key list client {client} {error}") from error
            if hash_of_model(content) != hash_of_model(current.own):
                raise Damaged(f"client {client} received another model than this one: nothing is masked")
        return public

    def _mask(self, current: MaskSession, message: MaskMessage) -> Update:
        names = {str(client): client for client in current.public if client != self._client}
        listed = message.payloads["shares"]
        if unknown := listed.tensors.keys() - names.keys():
            raise Damaged(f"the share list has {min(unknown)}, which is no other client with keys")
        sizes = {name: token_bytes(len(current.groups_of(names[name]))) for name in listed.tensors}
        held = {self._client: current.held[self._client]}
        for name, token in open_payload(listed, sizes).items():
            held[names[name]] = self._read_shares(current, message.round, names[name], token)
        current.held = held
        if len(held) < (threshold := self._threshold(current)):
            raise Damaged(f"{len(held)} clients sent shares, and {threshold} are needed to unmask")
        payloads = current.update.payloads
        masked: dict[str, Payload] = {}
        for group in current.seeds:
            masked |= self._mask_group(
                current, group, {name: payloads[name] for name in current.groups[group]}
            )
        return replace(current.update, payloads={slice_: masked[slice_] for slice_ in payloads})

    def _read_shares(
        self, current: MaskSession, round_: int, sender: int, token: bytes
    ) -> tuple[bytes, dict[str, bytes]]:
        try:
            plain = unseal(self._cipher_key(current, sender), token)
        except Damaged as error:
            raise Damaged(f"the shares of client {sender} cannot be decrypted") from error
        groups, place = current.groups_of(sender), current.places[self._client]
        if plain[:HEAD_BYTES] != _head(round_, sender, self._client):
            raise Damaged(f"the shares of client {sender} are those of another round or client")
        if len(plain) != HEAD_BYTES + SHARE_BYTES * (1 + len(groups)):
            raise Damaged(f"client {sender} has sent {len(plain)} bytes of shares")
        starts = range(HEAD_BYTES, len(plain), SHARE_BYTES)
        key, *seeds = (check_share(plain[start : start + SHARE_BYTES], place) for start in starts)
        return key, dict(zip(groups, seeds, strict=True))

    def _mask_group(
        self, current: MaskSession, group: str, payloads: Mapping[str, Payload]
    ) -> dict[str, Payload]:
        """The vectors of a group of slices, with the client's own mask and one for each other client."""
        bits = self._secure.fixed.modulus_bits
        counts = {slice_: STATISTICS + payload.params for slice_, payload in payloads.items()}
        count = sum(counts.values())
        total = own_mask(current.seeds[group], group, count, bits)
        for client in current.held:
            if client != self._client and group in current.planned[client]:
                public, _ = split_keys(current.public[client])
                pair = (self._client, client)
                total = total + pair_mask(current.keys[0], public, pair, current.session, group, count, bits)
        masks = split_by(counts, total)
        masked = {}
        for slice_, payload in payloads.items():
            vector = masks[slice_] + unpack_integers(payload.tensors[INTEGERS], bits, counts[slice_])
            masked[slice_] = Payload({INTEGERS: pack_integers(vector, bits)}, payload.params)
        return masked

    def _reveal(self, current: MaskSession, message: MaskMessage) -> MaskMessage:
        survivors = read_survivors(message, {*current.held})
        if len(survivors) < (threshold := self._threshold(current)):
            raise Damaged(f"{len(survivors)} clients survive, and {threshold} are needed to unmask")
        if self._client not in survivors:
            raise Damaged("the survivors are without this client, which has sent its masked update")
        summed = self._secure.summed_slices(current.planned, survivors)
        seeds = {
            f"{client}.{group}": content
            for client in sorted(survivors)
            for group, content in current.held[client][1].items()
            if group in summed
        }
        keys = {str(client): current.held[client][0] for client in sorted(current.held.keys() - survivors)}
        return self._message("revealed", {"seeds": bytes_payload(seeds), "keys": bytes_payload(keys)})

    def _cipher_key(self, current: MaskSession, client: int) -> bytes:
        low, high = sorted((self._client, client))
        _, public = split_keys(current.public[client])
        return current.keys[1].agree(public, "shares", current.session, low, high)

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
