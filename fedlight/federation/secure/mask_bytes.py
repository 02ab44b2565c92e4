"""The bytes of keys, shares and unmasking in a round of secure aggregation, counted without any secret.

A client sends 2 public keys and a hash of the model that it received, a share of each of its secrets to each
other client, and in the end a share of the secrets of each client. So its traffic grows linearly with the
cohort, and that of the server with its square (Bonawitz et al. 2017, table 1).
"""

from collections.abc import Collection, Mapping

from fedlight.federation.secure.signatures import SIGNATURE_BYTES
from fedlight.federation.secure.sum_sizes import group_slices, groups_of

KEY_BYTES = 32  # of an X25519 key, of a SHA-256
KEYS_BYTES = 3 * KEY_BYTES  # public keys of a client, of masks and of encryption, and a hash of its model
SECRET_BYTES = 16  # of a secret that is shared: one block of Shamir's secret sharing
PLACE_BYTES = 4  # of a client number
SHARE_BYTES = PLACE_BYTES + SECRET_BYTES
HEAD_BYTES = 3 * PLACE_BYTES  # before encrypted shares: round, sender, receiver


def keys_bytes(signed: bool) -> int:
    """Bytes of the public keys of a client and of the hash, with its signature or without."""
    return KEYS_BYTES + (SIGNATURE_BYTES if signed else 0)


def token_bytes(groups: int) -> int:
    """Bytes of an encrypted message (Fernet): a share of a client's key, and of a seed for each group."""
    plain = HEAD_BYTES + SHARE_BYTES * (1 + groups)
    encrypted = 1 + 8 + 16 + 16 * (plain // 16 + 1) + 32  # version, time, start, padded blocks, HMAC
    return 4 * -(-encrypted // 3)


def mask_traffic(
    planned: Mapping[int, tuple[str, ...]],
    reporters: Collection[int],
    summed: Collection[str] | None,
    signed: bool = False,
) -> dict[int, tuple[int, int]]:
    """Client: bytes to it and from it, beside its broadcast and its masked update, where no reporter fails.

    Args:
        planned: client: the slices that it is to report in the round.
        reporters: the clients that trained.
        summed: the slices that enough clients report; None where the clients are fewer than can unmask, so
            that they send their keys alone.
        signed: whether clients sign their public keys.
    """
    keys = keys_bytes(signed)
    groups = group_slices(planned)
    masked = {client: groups_of(groups, planned[client]) for client in reporters}
    sent = {client: keys + KEY_BYTES * len(names) for client, names in masked.items()}
    if summed is None:
        return {client: (0, size) for client, size in sent.items()}
    tokens = {client: token_bytes(len(names)) for client, names in masked.items()}
    revealed = SHARE_BYTES * sum(name in summed for names in masked.values() for name in names)
    traffic = {}
    for client in reporters:
        down = len(masked) * (keys + PLACE_BYTES) + sum(tokens.values()) - tokens[client]
        up = sent[client] + (len(masked) - 1) * tokens[client] + revealed
        traffic[client] = down, up
    return traffic
