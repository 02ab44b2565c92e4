"""The process of an institution that trains: it loads libraries and images once, and answers over a socket.

Flower starts a short-lived process for each message; that one hands the message on to this one, which ends
with the SuperNode. The socket lies in a folder that only its user may enter.
"""

import json
import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Listener
from pathlib import Path

LOOK = 1.0  # seconds between two looks at the process that it ends with


def main() -> None:
    """Serves until the process of the given number has ended; arguments: SOCKET PROCESS."""
    path, parent = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(parent, path), daemon=True).start()
    from fedlight.deployment.deployed import Institution
    from fedlight.federation.transport.envelope import FAILED, MEMORY_LOST
    from fedlight.runtime.errors import BadInput, Damaged, MemoryLost
    from fedlight.runtime.printable import printable

    made: tuple[bytes, Institution] | None = None
    path.unlink(missing_ok=True)
    with Listener(str(path), "AF_UNIX") as listener:
        while True:
            with listener.accept() as caller:
                try:
                    whose, content = caller.recv_bytes(), caller.recv_bytes()
                    if made is None or made[0] != whose:
                        asked = json.loads(whose)
                        made = (
                            whose,
                            Institution.make(
                                Path(asked["path"]),
                                asked["agreed"],
                                asked["client"],
                                asked["root"],
                                Path(asked["memory"]),
                            ),
                        )
                    problem, answer = b"", made[1].answer(content) if content else b""
                except MemoryLost as error:
                    print(f"fedlight: {error}", file=sys.stderr)
                    problem, answer = MEMORY_LOST.encode(), b""
                except (BadInput, Damaged) as error:
                    print(f"fedlight: refused: {printable(error)}", file=sys.stderr)
                    problem, answer = FAILED.encode(), b""
                except Exception as error:  # it stays here: an error's text may say what data hold
                    print(f"fedlight: error: {error}", file=sys.stderr)
                    traceback.print_exc()
                    problem, answer = FAILED.encode(), b""
                try:
                    caller.send_bytes(problem)
                    caller.send_bytes(answer)
                except OSError:
                    print("fedlight: nobody waits for the answer any more", file=sys.stderr)


def _end_with(parent: int, path: Path) -> None:
    while True:
        try:
            os.kill(parent, 0)
        except OSError:
            path.unlink(missing_ok=True)
            os._exit(0)
        time.sleep(LOOK)


if __name__ == "__main__":
    main()
