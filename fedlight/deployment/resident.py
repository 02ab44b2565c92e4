"""The process of an institution that trains: it loads libraries and images once, and answers over a socket.

Flower starts a short-lived process for each message, which hands the message on to this one. This process
ends with the SuperNode. The socket lies in a folder that only its user may enter.
"""

import json
import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Listener
from pathlib import Path

INTERVAL = 1.0  # seconds between two checks whether the SuperNode still runs


def main() -> None:
    """Serves until the SuperNode has ended; arguments: SOCKET PROCESS, the id of the SuperNode's process."""
    socket, node = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with_node, args=(node, socket), daemon=True).start()
    serve_socket(socket)


def serve_socket(socket: Path) -> None:
    """Answers one connection after another; an institution is built once, and again for other arguments."""
    from fedlight.deployment.institution import Institution
    from fedlight.federation.transport.envelope import FAILED, MEMORY_LOST
    from fedlight.runtime.errors import BadInput, Damaged, MemoryLost
    from fedlight.runtime.printable import printable

    def make_institution(arguments: bytes) -> Institution:
        values = json.loads(arguments)
        path, memory = Path(values["path"]), Path(values["memory"])
        key = Path(values["key"]) if values["key"] else None
        return Institution.make(path, values["agreed"], values["client"], values["root"], memory, key)

    current: tuple[bytes, Institution] | None = None
    socket.unlink(missing_ok=True)
    with Listener(str(socket), "AF_UNIX") as listener:
        while True:
            with listener.accept() as caller:
                try:
                    arguments, content = caller.recv_bytes(), caller.recv_bytes()
                    if current is None or current[0] != arguments:
                        current = arguments, make_institution(arguments)
                    problem, answer = "", current[1].answer(content) if content else b""
                except MemoryLost as error:
                    print(f"fedlight: {error}", file=sys.stderr)
                    problem, answer = MEMORY_LOST, b""
                except (BadInput, Damaged) as error:
                    print(f"fedlight: refused: {printable(error)}", file=sys.stderr)
                    problem, answer = FAILED, b""
                except Exception as error:  # it stays here: an error's text may say what data hold
                    print(f"fedlight: error: {error}", file=sys.stderr)
                    traceback.print_exc()
                    problem, answer = FAILED, b""
                try:
                    caller.send_bytes(problem.encode())
                    caller.send_bytes(answer)
                except OSError:
                    print("fedlight: the caller has gone; its answer is kept", file=sys.stderr)


def _end_with_node(node: int, socket: Path) -> None:
    while True:
        try:
            os.kill(node, 0)
        except OSError:
            socket.unlink(missing_ok=True)
            os._exit(0)
        time.sleep(INTERVAL)


if __name__ == "__main__":
    main()
