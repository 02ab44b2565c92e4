"""What a test starts in place of the interpreter: asks the fork server for a process, and stands for it.

The program that `forkserver.warm_python` writes is the text of this file and a call of `main`. It runs with
-I -S, and imports little, to begin in a fiftieth of a second.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)


def main(python: str, server: str, at_start: dict) -> None:
    """Becomes the real interpreter, or lives as long as a fork.

    Args:
        python: the real interpreter.
        server: the server's socket.
        at_start: variables that must have these values; None: that must not be there.
    """
    arguments, unbuffered = sys.argv[1:], False
    while arguments and arguments[0] in ("-u", "-B"):
        unbuffered |= arguments.pop(0) == "-u"
    if not is_served(arguments, at_start):
        os.execv(python, [python, *sys.argv[1:]])
    files = open_files()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "process": os.getpid(),
        "arguments": arguments,
        "unbuffered": unbuffered,
        "files": files,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "ignored": ignored,
        "umask": umask,
        "powers": read_powers(),
    }
    early = []
    for number in set(FORWARDED) - set(ignored):
        signal.signal(number, lambda number, _: early.append(number))
    content = json.dumps(request).encode()
    socket.send_fds(connection, [len(content).to_bytes(8, "little")], files)
    connection.sendall(content)
    for file in files:
        os.close(file)
    fork = int.from_bytes(connection.recv(8), "little")
    if not fork:  # the server has ended
        end(-signal.SIGKILL)
    for number in set(FORWARDED) - set(ignored):
        signal.signal(number, lambda number, _: send(fork, number))
    for number in early:
        send(fork, number)
    answer = connection.recv(8)
    end(int.from_bytes(answer, "little", signed=True) if answer else -signal.SIGKILL)


def is_served(arguments: list, at_start: dict) -> bool:
    """Whether a fork can be what was asked for; helpers that load no library are better begun anew."""
    if not arguments or "resource_tracker" in " ".join(arguments[:2]):
        return False
    if arguments[0][0] == "-" and arguments[0] not in ("-m", "-c"):
        return False
    threads = os.environ.get("MKL_NUM_THREADS", "1")
    return threads == "1" and all(os.environ.get(name) == value for name, value in at_start.items())


def open_files() -> list:
    """The descriptors that a new program would inherit."""
    files = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                files.append(int(name))
        except OSError:  # that of the listing itself
            continue
    return files


def read_powers() -> int:
    """The capabilities that this process and what it starts may ever have, a bit for each."""
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("CapBnd:")]
    return int(line.split()[1], 16)


def send(fork: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(fork, number)


def end(status: int) -> None:
    """Ends as the fork did: with its status, or by its signal where that is negative."""
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
