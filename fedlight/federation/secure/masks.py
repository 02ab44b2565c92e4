"""Keys, seeds, shares and masks of secure aggregation, on the primitives of `cryptography` and Flower.

Key agreement is X25519, key derivation HKDF-SHA256, a mask is the key stream of AES-256 in counter mode;
secrets of 128 bits are shared by PyCryptodome's Shamir, on which Flower's stands, and sent under Flower's
Fernet. Flower's own generator of masks is not used: it reduces a seed to 32 bits and draws from a Mersenne
Twister, whose output can be predicted. Nor is its Shamir: it pads a secret of 16 bytes to two blocks.
"""

import base64
import hashlib
import secrets
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedlight.federation.messages import AUX, Payload, State
from fedlight.federation.secure.integers import unpack_integers
from fedlight.federation.secure.mask_bytes import (
    KEY_BYTES,
    KEYS_BYTES,
    PLACE_BYTES,
    SECRET_BYTES,
    SHARE_BYTES,
)
from fedlight.runtime.errors import Damaged
from fedlight.runtime.hashing import state_sha256

START = bytes(16)  # of the counter; a key encrypts one stream only


class KeyPair:
    """An X25519 key of one round.

    Args:
        secret: 16 bytes from which the private half is derived; None draws new ones.

    Attributes:
        secret: that secret.
        public: the public half, 32 bytes.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.secret = new_secret() if secret is None else secret
        self._private = X25519PrivateKey.from_private_bytes(derive(self.secret, "key"))
        self.public: bytes = self._private.public_key().public_bytes_raw()

    def agree(self, public: bytes, *purpose: int | str | bytes) -> bytes:
        """The secret that this key and another one have in common, 32 bytes, for one purpose.

        Raises:
            Damaged: the other key is none.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise Damaged("has a public key that is none") from error
        return derive(shared, *purpose)


def new_secret() -> bytes:
    """16 random bytes of the operating system."""
    return secrets.token_bytes(SECRET_BYTES)


def derive(secret: bytes, *purpose: int | str | bytes) -> bytes:
    """A key of 32 bytes for one purpose from a secret."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = repr(("fedlight", *purpose)).encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def expand(key: bytes, count: int, bits: int) -> NDArray[np.uint64]:
    """A mask of `count` integers, uniform modulo 2^bits, from a key that is used once."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    size = count * bits // 8
    stream = Cipher(AES256(key), CTR(START)).encryptor().update(bytes(size))
    return unpack_integers(torch.frombuffer(bytearray(stream), dtype=torch.uint8), bits, count)


def commit(secret: bytes) -> bytes:
    """A hash that binds a client to a random secret of 16 bytes without revealing it."""
    return hashlib.sha256(b"fedlight commitment" + secret).digest()


def share(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret of 16 bytes, of which `threshold` reveal it and fewer say nothing (Shamir)."""
    from Crypto.Protocol.SecretSharing import Shamir

    shares = Shamir.split(threshold, count, secret, ssss=False)
    return [place.to_bytes(PLACE_BYTES, "little") + content for place, content in shares]


def combine(shares: list[bytes]) -> bytes:
    """The secret of `threshold` shares of different holders; other bytes where one is wrong."""
    from Crypto.Protocol.SecretSharing import Shamir

    places = [int.from_bytes(one[:PLACE_BYTES], "little") for one in shares]
    contents = [one[PLACE_BYTES:] for one in shares]
    return bytes(Shamir.combine(list(zip(places, contents, strict=True)), ssss=False))


def check_share(content: bytes, place: int) -> bytes:
    """Returns a share; `place` is that of its holder among the clients, from 0.

    Raises:
        Damaged: it is no share, or that of another holder.
    """
    if len(content) != SHARE_BYTES or int.from_bytes(content[:PLACE_BYTES], "little") != place + 1:
        raise Damaged("has a share that is none, or is that of another client")
    return content


def seal(key: bytes, plain: bytes) -> bytes:
    """Encrypts and authenticates bytes with a key of 32 bytes."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt

    return bytes(encrypt(base64.urlsafe_b64encode(key), plain))


def unseal(key: bytes, token: bytes) -> bytes:
    """The inverse of `seal`.

    Raises:
        Damaged: the token was not made with this key.
    """
    from cryptography.fernet import InvalidToken
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt

    try:
        return bytes(decrypt(base64.urlsafe_b64encode(key), token))
    except InvalidToken as error:
        raise Damaged("cannot be decrypted") from error


def split_keys(content: bytes) -> tuple[bytes, bytes]:
    """A client's public keys of masks and of encryption, from its keys as they are sent."""
    return content[:KEY_BYTES], content[KEY_BYTES : 2 * KEY_BYTES]


def hash_of_model(content: bytes) -> bytes:
    """The hash that stands behind a client's public keys."""
    return content[2 * KEY_BYTES : KEYS_BYTES]


def hash_model(values: State, aux: State) -> bytes:
    """SHA-256 of the global slices and of the auxiliary state that a server sends in a round, 32 bytes."""
    named = {**values, **{f"{AUX}/{name}": tensor for name, tensor in aux.items()}}
    return bytes.fromhex(state_sha256(named))


def transcript(cell: str, round_: int, keys: Mapping[int, bytes]) -> bytes:
    """A hash of the public keys of a round; keys that are derived with it serve this round alone."""
    listed = b"".join(client.to_bytes(PLACE_BYTES, "little") + keys[client] for client in sorted(keys))
    return hashlib.sha256(repr((cell, round_)).encode() + listed).digest()


def own_mask(seed: bytes, group: str, count: int, bits: int) -> NDArray[np.uint64]:
    """What a client adds to a group of slices by itself, from a seed of 16 bytes."""
    return expand(derive(seed, "own mask", group), count, bits)


def pair_mask(
    pair: KeyPair, public: bytes, clients: tuple[int, int], session: bytes, group: str, count: int, bits: int
) -> NDArray[np.uint64]:
    """What the first of two clients adds for the second; the second adds its negative.

    Args:
        pair: the mask key of one of them.
        public: the mask key of the other.
        clients: the two.
        session: the transcript of the round.
        group: of the slices that are masked.
        count, bits: of the integers.
    """
    first, second = clients
    low, high = sorted(clients)
    mask = expand(pair.agree(public, "mask", session, low, high, group), count, bits)
    return mask if first < second else -mask


def bytes_payload(contents: Mapping[str, bytes]) -> Payload:
    """A payload of named bytes, which stand for no parameter."""
    return Payload(
        {
            name: torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if content
            else torch.zeros(0, dtype=torch.uint8)
            for name, content in contents.items()
        },
        0,
    )


def open_payload(payload: Payload, sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The bytes of an untrusted payload.

    Args:
        payload: as it arrived.
        sizes: name: number of bytes, of all that are expected.

    Raises:
        Damaged: it has other names or sizes.
    """
    if payload.params or payload.tensors.keys() != sizes.keys():
        raise Damaged(f"has {_names(payload.tensors)} instead of {_names(sizes)}")
    for name, tensor in payload.tensors.items():
        if tensor.dtype is not torch.uint8 or tensor.shape != (sizes[name],):
            raise Damaged(
                f"has {name} of {tensor.dtype} and shape {tuple(tensor.shape)} instead of {sizes[name]} bytes"
            )
    return {name: tensor.numpy().tobytes() for name, tensor in payload.tensors.items()}


def _names(named: Mapping[str, object] | State) -> str:
    names = sorted(named)
    return f"{len(names)} entries ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
