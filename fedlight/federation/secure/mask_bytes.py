"""The bytes of keys, shares and unmasking in a round of secure aggregation, counted without any secret.

A client sends 2 public keys, a share of each of its secrets to each other client, and in the end a share of
the secrets of each client. So its traffic grows linearly with the cohort, and that of the server with its
square (Bonawitz et al. 2017, table 1).
"""

from collections.abc import Collection, Mapping

KEY_BYTES = 32  # of an X25519 key, of a seed, of a SHA-256
KEYS_BYTES = 2 * KEY_BYTES  # public keys of a client: of masks and of encryption
PLACE_BYTES = 4  # of a client number
SHARE_BYTES = 52  # of 32 bytes by Shamir's secret sharing: 4 of its place, and 3 blocks of 16
HEAD_BYTES = 3 * PLACE_BYTES  # before encrypted shares: round, sender, receiver


def token_bytes(slices: int) -> int:
    """Bytes of an encrypted message (Fernet): a share of a client's key, and of a seed for each slice."""
    plain = HEAD_BYTES + SHARE_BYTES * (1 + slices)
    encrypted = 1 + 8 + 16 + 16 * (plain // 16 + 1) + 32  # version, time, start, padded blocks, HMAC
    return 4 * -(-encrypted // 3)


def mask_traffic(
    uplinks: Mapping[int, tuple[str, ...]], summed: Collection[str] | None
) -> dict[int, tuple[int, int]]:
    """Client: bytes to it and from it, beside its broadcast and its masked update, where no client fails.

    Args:
        uplinks: the slices that each client of the round reports.
        summed: the slices that enough clients report; None where the clients are fewer than can unmask, so
            that they send their keys alone.
    """
    clients = len(uplinks)
    commitments = {client: KEY_BYTES * len(uplink) for client, uplink in uplinks.items()}
    if summed is None:
        return {client: (0, KEYS_BYTES + commitments[client]) for client in uplinks}
    tokens = {client: token_bytes(len(uplink)) for client, uplink in uplinks.items()}
    revealed = SHARE_BYTES * sum(slice_ in summed for uplink in uplinks.values() for slice_ in uplink)
    traffic = {}
    for client in uplinks:
        down = clients * KEYS_BYTES + sum(tokens.values()) - tokens[client] + clients * PLACE_BYTES
        up = KEYS_BYTES + commitments[client] + (clients - 1) * tokens[client] + revealed
        traffic[client] = down, up
    return traffic
