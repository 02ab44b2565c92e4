"""The node keys of clients: each client number belongs to one key."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic, naming


class NodeKeys:
    """Binds client numbers to node keys, by a list or at first contact.

    Flower's SuperLink identifies a node by its key and verifies its signatures. Bindings of first contact are
    stored in a file, one line for each client, such as `2 SHA256:...`. If the coordinator removes a line,
    another node can have the number.

    Args:
        path: of that file.
        listed: fingerprints of the keys in client order, where the agreement lists them; no key is then bound
            at first contact.
    """

    def __init__(self, path: Path, listed: Sequence[str] | None) -> None:
        self._path = path
        self._listed = listed

    def claim(self, client: int, public_key: bytes) -> str | None:
        """Binds a client number to a key; returns why not where one of them is bound otherwise.

        Args:
            client: the number that a node claims.
            public_key: of the node, PEM.

        Raises:
            BadInput: the file has other content.
        """
        try:
            fingerprint = fingerprint_of(public_key)
        except ValueError:
            return "has a key that cannot be read"
        if self._listed is not None:
            if 0 <= client < len(self._listed) and self._listed[client] == fingerprint:
                return None
            return (
                f"says that it is client {client}, and its key {fingerprint} is not that client's in the "
                "agreement"
            )
        bound = self._read()
        if bound.get(client) == fingerprint:
            return None
        if client in bound:
            return (
                f"says that it is client {client}, which belongs to the key {bound[client]}, and its own is "
                f"{fingerprint}; where a node was replaced, remove the line of client {client} from "
                f"{self._path}"
            )
        if fingerprint in bound.values():
            other = next(number for number, key in bound.items() if key == fingerprint)
            return f"says that it is client {client}, and its key belongs to client {other}"
        lines = [f"{number} {key}\n" for number, key in sorted({**bound, client: fingerprint}.items())]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self._path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        return None

    def _read(self) -> dict[int, str]:
        bound: dict[int, str] = {}
        try:
            with naming(self._path):
                lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return bound
        except ValueError as error:
            raise BadInput(f"{self._path} is not a text file in UTF-8") from error
        for line in lines:
            client, _, key = line.partition(" ")
            try:
                bound[int(client)] = check_fingerprint(key)
            except (ValueError, BadInput) as error:
                raise BadInput(
                    f"{self._path}: '{line}' is no client number and fingerprint, such as 2 SHA256:..."
                ) from error
        return bound


def fingerprint_of(public_key: bytes) -> str:
    """The fingerprint of a node's key, as `ssh-keygen -l` prints it: `SHA256:` and 43 digits of base64.

    Raises:
        ValueError: the bytes are no key in PEM.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        key = load_pem_public_key(public_key)
        line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    except UnsupportedAlgorithm as error:
        raise ValueError("a key of an unknown kind") from error
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def check_fingerprint(text: str) -> str:
    """Returns the text.

    Raises:
        BadInput: it is no fingerprint of a key.
    """
    kind, _, digits = text.partition(":")
    try:
        length = len(base64.b64decode(f"{digits}=", validate=True))
    except ValueError:
        length = 0
    if kind != "SHA256" or length != hashlib.sha256().digest_size:
        raise BadInput(
            f"'{text}' is no fingerprint of a node's key, as ssh-keygen -lf node.key.pub prints it"
        )
    return text
