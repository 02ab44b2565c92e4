"""An institution's Flower ClientApp: it hands each message on to the resident process of its SuperNode."""

import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from fedlight.deployment.agreement import hash_agreement
from fedlight.federation.transport.envelope import CLIENT, FAILED, HASH, PROBLEM, open_bytes, wrap
from fedlight.runtime.errors import Damaged
from fedlight.runtime.printable import printable

LONGEST_SOCKET = 103  # bytes of a path of AF_UNIX, on macOS; Linux takes 107
START = 300.0  # seconds that the resident process has for loading its libraries


def answer(content: Any, path: Path, node_config: dict[str, Any]) -> Any:
    """The answer to the content of one of Flower's messages.

    Args:
        content: the server's message as bytes, or none where the server only asks which client this is.
        path: of the agreement that came with the app.
        node_config: `client`, the institution's number; `agreed`, the SHA-256 of the agreement; `data-root`,
            its images; `memory`, the folder for what it keeps; `key`, the private key of its node, where the
            agreement has it sign. The last three may be absent.
    """
    sha256 = hash_agreement(path)
    client, agreed = int(node_config["client"]), str(node_config["agreed"])
    if sha256 != agreed:
        print(f"fedlight: the app's {path.name} has the SHA-256 {sha256}, and {agreed} was agreed: refused")
        return wrap(b"", {CLIENT: client, HASH: agreed})
    root = node_config.get("data-root")
    key = node_config.get("key")
    institution = {
        "path": str(path),
        "agreed": agreed,
        "client": client,
        "root": None if root is None else str(Path(root).absolute()),
        "memory": str(Path(node_config.get("memory", "memory")).absolute()),
        "key": None if key is None else str(Path(key).absolute()),
    }
    try:
        message = open_bytes(content)
    except Damaged as error:
        print(f"fedlight: the server's message: {printable(error)}: refused", file=sys.stderr)
        return wrap(b"", {CLIENT: client, HASH: "", PROBLEM: FAILED})
    with _connect_resident() as resident:
        resident.send_bytes(json.dumps(institution).encode())
        resident.send_bytes(message)
        problem, reply = resident.recv_bytes().decode(), resident.recv_bytes()
    if problem:
        return wrap(b"", {CLIENT: client, HASH: "", PROBLEM: problem})
    return wrap(reply, {CLIENT: client, HASH: sha256})


def socket_path(node: int) -> Path:
    """The socket of a SuperNode's resident process, in a folder that only this user may enter.

    The folder is below TMPDIR, or below /tmp where the path would be too long for a socket.

    Args:
        node: id of the SuperNode's process.

    Raises:
        PermissionError: the folder belongs to another user, others may enter it, or it is a link.
    """
    name = f"fedlight-{os.getuid()}"
    path = Path(tempfile.gettempdir()) / name / str(node)
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        path = Path("/tmp") / name / str(node)
    folder = path.parent
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder that belongs to this user alone")
    return path


def _connect_resident() -> Connection:
    """Connects to the resident process of this SuperNode; starts it where there is none."""
    node = os.getppid()
    path, deadline, started = socket_path(node), time.monotonic() + START, None
    while True:
        try:
            return Client(str(path), "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            if started is None:
                command = [sys.executable, "-m", "fedlight.deployment.resident", str(path), str(node)]
                started = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            if started.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
