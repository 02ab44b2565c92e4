"""Signatures of a client's public keys by the key of its node (ECDSA on P-384), which the agreement lists.

Without them the server, which passes the keys of a round on, could replace them by its own and read every
masked update.
"""

from collections.abc import Sequence
from pathlib import Path

from fedlight.federation.transport.node_keys import fingerprint_of
from fedlight.runtime.errors import BadInput, Damaged

POINT_BYTES = 49  # of a public key on P-384, compressed
NUMBER_BYTES = 48  # of each of a signature's two numbers
SIGNATURE_BYTES = POINT_BYTES + 2 * NUMBER_BYTES


class Signer:
    """Signs with the private key of a node.

    Args:
        path: of the key, as `ssh-keygen -t ecdsa -b 384` writes it.

    Attributes:
        fingerprint: of its public half.

    Raises:
        BadInput: there is no such key without a passphrase.
    """

    def __init__(self, path: Path) -> None:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

        try:
            key = load_ssh_private_key(path.read_bytes(), None)
        except OSError as error:
            raise BadInput(f"key={path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise BadInput(f"key={path} is no private key of OpenSSH without a passphrase") from error
        if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
            raise BadInput(f"key={path} is no ECDSA key on P-384, as ssh-keygen -t ecdsa -b 384 makes it")
        self._key = key
        public = key.public_key()
        self._point = public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        self.fingerprint = fingerprint_of(
            public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )

    def sign(self, content: bytes) -> bytes:
        """The public key and the signature, SIGNATURE_BYTES."""
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
        from cryptography.hazmat.primitives.hashes import SHA384

        numbers = decode_dss_signature(self._key.sign(content, ECDSA(SHA384())))
        return self._point + b"".join(number.to_bytes(NUMBER_BYTES, "big") for number in numbers)


def load_signer(path: Path, client: int, listed: Sequence[str]) -> Signer:
    """The signer of a client.

    Args:
        path: of the private key of its node.
        client: its number.
        listed: fingerprints of the keys in client order, of the agreement.

    Raises:
        BadInput: `path` is no such key, or the agreement lists another one for the client.
    """
    signer = Signer(path)
    if signer.fingerprint != listed[client]:
        raise BadInput(
            f"key={path} has the fingerprint {signer.fingerprint}, and the agreement lists "
            f"{listed[client]} for client {client}"
        )
    return signer


def check_signature(signature: bytes, content: bytes, fingerprint: str) -> None:
    """Checks an untrusted signature.

    Args:
        signature: as `Signer.sign` returns it.
        content: that is signed.
        fingerprint: of the key that must have signed it.

    Raises:
        Damaged: the key is another one, or has not signed this content.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
    from cryptography.hazmat.primitives.hashes import SHA384
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    point, first, second = (
        signature[:POINT_BYTES],
        signature[POINT_BYTES:-NUMBER_BYTES],
        signature[-NUMBER_BYTES:],
    )
    try:
        key = EllipticCurvePublicKey.from_encoded_point(SECP384R1(), point)
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if fingerprint_of(pem) != fingerprint:
            raise Damaged("has public keys that are signed by another key than that of the agreement")
        encoded = encode_dss_signature(int.from_bytes(first, "big"), int.from_bytes(second, "big"))
        key.verify(encoded, content, ECDSA(SHA384()))
    except (ValueError, InvalidSignature) as error:
        raise Damaged("has public keys whose signature is invalid") from error


def signed_content(cell: str, round_: int, client: int, keys: bytes) -> bytes:
    """What a client signs: its public keys, and for which client and round they are."""
    return repr(("fedlight keys of secure aggregation", cell, round_, client)).encode() + keys
