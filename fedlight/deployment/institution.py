"""What the Flower ClientApp of an institution does with a message: it hands it to the resident process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from fedlight.deployment.agreement import agreed_hash
from fedlight.federation.transport.envelope import CLIENT, FAILED, HASH, PROBLEM, open_bytes, wrap
from fedlight.runtime.errors import Damaged
from fedlight.runtime.printable import printable

LONGEST_SOCKET = 103  # bytes of a path of AF_UNIX, on macOS; Linux takes 107
START = 300.0  # seconds that the resident process has for loading its libraries


def answer(content: Any, path: Path, node_config: dict[str, Any]) -> Any:
    """The answer to the content of one of Flower's messages.

    Args:
        content: the server's message as bytes, or none where it only asks who this is.
        path: of the agreement that came with the app.
        node_config: `client`, the institution's number; `agreed`, the SHA-256 of the agreement; `data-root`,
            its images; `memory`, the folder for what it keeps. The last two may be absent.
    """
    found = agreed_hash(path)
    client, agreed_to = int(node_config["client"]), str(node_config["agreed"])
    if found != agreed_to:
        print(f"fedlight: the app's {path.name} has the SHA-256 {found}, and {agreed_to} was agreed: refused")
        return wrap(b"", {CLIENT: client, HASH: agreed_to})
    root = node_config.get("data-root")
    whose = {
        "path": str(path),
        "agreed": agreed_to,
        "client": client,
        "root": None if root is None else str(Path(root).absolute()),
        "memory": str(Path(node_config.get("memory", "memory")).absolute()),
    }
    try:
        message = open_bytes(content)
    except Damaged as error:
        print(f"fedlight: the server's message: {printable(error)}: refused", file=sys.stderr)
        return wrap(b"", {CLIENT: client, HASH: "", PROBLEM: FAILED})
    with _resident() as resident:
        resident.send_bytes(json.dumps(whose).encode())
        resident.send_bytes(message)
        problem, reply = resident.recv_bytes().decode(), resident.recv_bytes()
    if problem:
        return wrap(b"", {CLIENT: client, HASH: "", PROBLEM: problem})
    return wrap(reply, {CLIENT: client, HASH: found})


def socket_path(node: int) -> Path:
    """Where the resident process of a SuperNode listens, in a folder that only this user may enter.

    The folder is below TMPDIR, or below /tmp where the path would be longer than a socket's may be.

    Args:
        node: number of the SuperNode's process.

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


def _resident() -> Connection:
    """A connection to the resident process of this SuperNode, which is started where there is none."""
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
