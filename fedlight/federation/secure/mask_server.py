"""The server's part in secure aggregation: it passes keys and shares on, and removes the masks of a sum."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
import torch
from numpy.typing import NDArray

from fedlight.federation.messages import MaskMessage, MaskStep, Payload
from fedlight.federation.secure.integers import split_by
from fedlight.federation.secure.mask_bytes import KEY_BYTES, SHARE_BYTES, keys_bytes, token_bytes
from fedlight.federation.secure.masks import (
    KeyPair,
    bytes_payload,
    check_share,
    combine,
    commit,
    hash_of_model,
    open_payload,
    own_mask,
    pair_mask,
    split_keys,
    transcript,
)
from fedlight.federation.secure.secure_sum import STATISTICS, SecureAggregation
from fedlight.federation.secure.sum_sizes import fewest_that_unmask, group_slices, groups_of
from fedlight.runtime.errors import Damaged

TRIES = 300  # sets of shares that are tried where a share is wrong


@dataclass(frozen=True)
class Revealed:
    """The shares that one client revealed, by the name of the secret."""

    seeds: dict[str, bytes]
    keys: dict[str, bytes]


class MaskServer:
    """The masks of one round.

    Args:
        cell: id of the federation.
        round_: 1..R.
        secure: encodes updates, and has the rules of sums.
        planned: client: the slices that it is to report in the round.
        params: slice: the number of scalars in its vector.
        model: SHA-256 of what clients receive.

    Attributes:
        keyed: the clients that have sent keys.
        sharing: those of them that have sent shares.
        liars: clients whose revealed share was wrong, as far as the others show it.
    """

    def __init__(
        self,
        cell: str,
        round_: int,
        secure: SecureAggregation,
        planned: dict[int, tuple[str, ...]],
        params: dict[str, int],
        model: bytes,
    ) -> None:
        self._cell = cell
        self._round = round_
        self._secure = secure
        self._planned = planned
        self._params = params
        self._model = model
        self.threshold = fewest_that_unmask(secure.threshold, len(planned))
        self._public: dict[int, bytes] = {}
        self._commitments: dict[int, dict[str, bytes]] = {}
        self._tokens: dict[int, dict[str, bytes]] = {}
        self._survivors: set[int] = set()
        self._summed: set[str] = set()
        self._revealed: dict[int, Revealed] = {}
        self._groups = group_slices(planned)
        self.liars: set[int] = set()

    @property
    def keyed(self) -> set[int]:
        """The clients that have sent keys."""
        return {*self._public}

    @property
    def sharing(self) -> set[int]:
        """The clients that have sent shares."""
        return {*self._tokens}

    def add_keys(self, message: MaskMessage) -> None:
        """Takes the keys of a client that has trained.

        Raises:
            Damaged: they are invalid; nothing is kept then.
        """
        keys, commitments = _payloads(message, "keys", ("keys", "commitments"))
        opened = open_payload(keys, {"own": keys_bytes(self._secure.signers is not None)})["own"]
        bound = open_payload(commitments, dict.fromkeys(self._groups_of(message.client), KEY_BYTES))
        halves = {*split_keys(opened)}
        taken = {half for content in self._public.values() for half in split_keys(content)}
        if len(halves) < 2 or halves & taken:
            raise Damaged("has a public key that another one is equal to")
        for half in halves:
            KeyPair().agree(half, "check")
        if hash_of_model(opened) != self._model:
            raise Damaged("says that it received another model than that of the round")
        self._secure.check_keys(self._cell, self._round, message.client, opened)
        self._public[message.client], self._commitments[message.client] = opened, bound

    def key_lists(self) -> list[MaskMessage]:
        """The keys of all clients, for each of them."""
        listed = bytes_payload({str(client): self._public[client] for client in sorted(self._public)})
        return [self._message(client, "key list", {"keys": listed}) for client in sorted(self._public)]

    def add_shares(self, message: MaskMessage) -> None:
        """Takes the encrypted shares of a client, which the server cannot read.

        Raises:
            Damaged: they are not those for all other clients; nothing is kept then.
        """
        (shares,) = _payloads(message, "shares", ("shares",))
        size = token_bytes(len(self._groups_of(message.client)))
        others = {str(client): size for client in self._public if client != message.client}
        self._tokens[message.client] = open_payload(shares, others)

    def share_lists(self) -> list[MaskMessage]:
        """For each client that has sent shares, those that the others have sent for it."""
        return [
            self._message(
                client,
                "share list",
                {
                    "shares": bytes_payload(
                        {
                            str(sender): self._tokens[sender][str(client)]
                            for sender in sorted(self._tokens)
                            if sender != client
                        }
                    )
                },
            )
            for client in sorted(self._tokens)
        ]

    def survivor_lists(self, survivors: Collection[int]) -> list[MaskMessage]:
        """The clients whose masked update arrived, for each of them."""
        self._survivors = set(survivors)
        self._summed = self._secure.summed_slices(self._planned, self._survivors)
        tensor = torch.tensor(sorted(survivors), dtype=torch.int32)
        payloads = {"clients": Payload({"survivors": tensor}, 0)}
        return [self._message(client, "survivors", payloads) for client in sorted(survivors)]

    def add_revealed(self, message: MaskMessage) -> None:
        """Takes the shares that a survivor reveals.

        Raises:
            Damaged: they are not those that were to be revealed; nothing is kept then.
        """
        seeds, keys = _payloads(message, "revealed", ("seeds", "keys"))
        names = [f"{client}.{group}" for client, group in self._own_masks()]
        dropped = [str(client) for client in self._dropped()]
        revealed = Revealed(
            open_payload(seeds, dict.fromkeys(names, SHARE_BYTES)),
            open_payload(keys, dict.fromkeys(dropped, SHARE_BYTES)),
        )
        place = sorted(self._public).index(message.client)
        for content in (*revealed.seeds.values(), *revealed.keys.values()):
            check_share(content, place)
        self._revealed[message.client] = revealed

    @property
    def revealing(self) -> set[int]:
        """The clients that have revealed shares."""
        return {*self._revealed}

    def masks(self) -> dict[str, NDArray[np.uint64]]:
        """Slice: the sum of the masks in the sum of the survivors' updates; of each slice that may be known.

        Raises:
            Damaged: the revealed shares are too few, or do not give the secrets that clients committed to.
        """
        bits = self._secure.fixed.modulus_bits
        counts = {
            group: {slice_: STATISTICS + self._params[slice_] for slice_ in slices}
            for group, slices in self._groups.items()
            if group in self._summed
        }
        totals = {group: np.zeros(sum(sizes.values()), np.uint64) for group, sizes in counts.items()}
        for client, group in self._own_masks():
            shares = {h: revealed.seeds[f"{client}.{group}"] for h, revealed in self._revealed.items()}
            seed = self._reconstruct(client, shares, self._is_seed(client, group))
            totals[group] = totals[group] + own_mask(seed, group, len(totals[group]), bits)
        session = transcript(self._cell, self._round, self._public)
        for client in self._dropped():
            shares = {holder: revealed.keys[str(client)] for holder, revealed in self._revealed.items()}
            pair = KeyPair(self._reconstruct(client, shares, self._is_key(client)))
            for survivor in sorted(self._survivors):
                for group in totals.keys() & {*self._groups_of(client)} & {*self._groups_of(survivor)}:
                    public, _ = split_keys(self._public[survivor])
                    size = len(totals[group])
                    mask = pair_mask(pair, public, (survivor, client), session, group, size, bits)
                    totals[group] = totals[group] + mask
        masks: dict[str, NDArray[np.uint64]] = {}
        for group, total in totals.items():
            masks |= split_by(counts[group], total)
        return masks

    def _groups_of(self, client: int) -> list[str]:
        """The groups of slices that a client is to report."""
        return groups_of(self._groups, self._planned[client])

    def _own_masks(self) -> list[tuple[int, str]]:
        """Client and group of slices of each survivor's own mask in a sum that may be known."""
        return [
            (client, group)
            for client in sorted(self._survivors)
            for group in self._groups_of(client)
            if group in self._summed
        ]

    def _dropped(self) -> list[int]:
        """The clients whose masks are in the survivors' updates, and whose own update did not arrive."""
        return sorted(self._tokens.keys() - self._survivors)

    def _is_seed(self, client: int, group: str) -> Callable[[bytes], bool]:
        return lambda secret: commit(secret) == self._commitments[client][group]

    def _is_key(self, client: int) -> Callable[[bytes], bool]:
        public, _ = split_keys(self._public[client])
        return lambda secret: KeyPair(secret).public == public

    def _reconstruct(self, client: int, shares: dict[int, bytes], fits: Callable[[bytes], bool]) -> bytes:
        """The secret of a client from the shares of others, of which some may be wrong."""
        if len(shares) < self.threshold:
            raise Damaged(f"{len(shares)} clients reveal shares, and {self.threshold} are needed to unmask")
        honest = sorted(shares, key=lambda holder: (holder in self.liars, holder))
        for chosen in islice(combinations(honest, self.threshold), TRIES):
            secret = combine([shares[holder] for holder in chosen])
            if fits(secret):
                self._note_liars(shares, chosen, secret)
                return secret
        raise Damaged(f"the shares of client {client} do not give the secret that it committed to")

    def _note_liars(self, shares: dict[int, bytes], chosen: tuple[int, ...], secret: bytes) -> None:
        """Finds the holders whose share does not fit a secret, by putting each in the place of another one.

        Where the first set of shares fits, the others are not looked at: they change nothing.
        """
        first = tuple(sorted(shares, key=lambda holder: (holder in self.liars, holder))[: self.threshold])
        if chosen == first:
            return
        for holder in shares.keys() - set(chosen):
            if combine([shares[other] for other in (*chosen[1:], holder)]) != secret:
                self.liars.add(holder)

    def _message(self, client: int, step: MaskStep, payloads: dict[str, Payload]) -> MaskMessage:
        return MaskMessage(self._cell, self._round, client, step, payloads)


def _payloads(message: MaskMessage, step: MaskStep, names: tuple[str, ...]) -> list[Payload]:
    """The payloads of an untrusted message of this step.

    Raises:
        Damaged: it is of another step, or has other payloads.
    """
    if message.step != step:
        raise Damaged(f"sends {message.step}, and {step} come next")
    if message.payloads.keys() != set(names):
        raise Damaged(f"has other payloads than {' and '.join(names)}")
    return [message.payloads[name] for name in names]
