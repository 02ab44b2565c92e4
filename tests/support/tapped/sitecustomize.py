"""Imported by every process of an institution: writes down what it sends, before TLS encrypts it."""

import os
import ssl
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["TAPPED"])


def write(name: str, content: bytes) -> None:
    with (FOLDER / f"{os.getpid()}-{name}").open("ab") as file:
        file.write(content)


def connects(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        write("addresses", f"{arguments[1]}\n".encode())


def send(socket: ssl.SSLSocket, content: Any, flags: int = 0) -> int:
    count = encrypt(socket, content, flags)
    write(f"{socket.getsockname()[1]}.sent", bytes(content)[:count])
    return count


FOLDER.mkdir(parents=True, exist_ok=True)
sys.addaudithook(connects)
encrypt, ssl.SSLSocket.send = ssl.SSLSocket.send, send  # type: ignore[method-assign]
