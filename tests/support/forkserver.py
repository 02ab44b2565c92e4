"""A fork server: processes begin with the libraries loaded, in a tenth of a second instead of ten seconds.

`warm_python()` is the path of a program that is called like the Python interpreter, by tests and by all that
they start: `[warm_python(), "-m", "fedlight.run", ...]`. It hands its arguments, environment, working folder
and open files to a server, which has loaded torch, lightning, diffusers and fedlight and computed nothing; a
fork of the server becomes the program. The caller keeps the process that it started (`forkclient`): that one
forwards signals to the fork, ends as the fork ends, and when it is killed the fork is killed. In the fork

- `sys.executable` is that program, so that its workers begin in the same way,
- `os.getppid()` is the parent of the process that the caller started; `os.getpid()` is the fork's own, and it
  leads a session of its own,
- texts have the same hashes in all forks, whatever `PYTHONHASHSEED`, which Dask sets for the same end,
- the capabilities that the caller does not have (`setpriv`) are given up,
- everything else is as in a new interpreter, but what libraries read from the environment as they load: where
  a variable of `READ_AT_START` differs, or for other options than -u and -B, the real interpreter is started.

A test of what is loaded, or of how an interpreter begins and ends, starts `sys.executable`.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkclient import read_powers

READ_AT_START = ("OMP_NUM_THREADS", "LC_ALL", "LANG", "PYTHONUTF8", "PYTHONIOENCODING")
READ_AT_START += ("PYTHONWARNINGS", "LD_PRELOAD", "MPLBACKEND", "DASK_INTERNAL_INHERIT_CONFIG")
READ_AT_START += ("FLWR_TELEMETRY_ENABLED", "FLWR_LOG_LEVEL")
SHARED = "WARM_PYTHON_FOLDER"
"""Names the folder of a server that all processes of a test session share."""

LIBRARIES = """
torch torch._dynamo torch.utils.data torchvision torch_fidelity lightning.pytorch
diffusers.models.unets.unet_2d diffusers.pipelines.ddpm.pipeline_ddpm safetensors.torch
pandas sklearn.datasets scipy.linalg scipy.stats matplotlib.pyplot PIL.Image
hydra submitit loky distributed jinja2 rich.live filelock pydantic
fedlight.experiment.cell fedlight.evaluation.classifier fedlight.loggers.metrics fedlight.data.digits
fedlight.federation.transport.processes fedlight.federation.transport.dask
flwr.cli.app flwr.superlink.cli flwr.supernode.cli flwr.supercore.cli
fedlight.deployment.institution fedlight.deployment.relay fedlight.deployment.serving
""".split()  # noqa: SIM905
LATE = {"fedlight.run", "fedlight.sweeps", "fedlight.report"}
"""Modules that are started with -m, and must not have been imported by then."""

PR_CAPBSET_DROP, LINUX_CAPABILITY_VERSION_3 = 24, 0x20080522
CLIENT = Path(__file__).with_name("forkclient.py")


@functools.cache
def warm_python() -> str:
    """The path of the program; starts a server where the test session has none yet, and waits for it."""
    folder = Path(os.environ.get(SHARED) or start_server())
    deadline = time.monotonic() + 300
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return str(folder / "python")


def start_server() -> Path:
    """Starts a server, which ends with this process; returns its folder, and does not wait for it."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))  # short: a socket's path has 107 characters at most
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program, listening = folder / "python", folder / "socket"
    at_start = {name: os.environ.get(name) for name in READ_AT_START}
    begin = f"main({sys.executable!r}, {str(listening)!r}, {at_start!r})\n"
    program.write_text(f"#!{sys.executable} -IS\n{CLIENT.read_text()}\n\n{begin}")
    program.chmod(stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
    folder.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(os.getpid())],
        stdin=subprocess.PIPE,  # at whose end the server ends, and kills its forks
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
        start_new_session=True,
        env=os.environ | {"JE_ARROW_MALLOC_CONF": "background_thread:false"},  # pandas imports pyarrow
    )
    assert server.stdin is not None
    atexit.register(server.wait, 60)  # called after the next
    atexit.register(server.stdin.close)
    return folder


def fork_of(process: int) -> int:
    """The fork for which a process stands; the process itself where it is a real interpreter."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(warm_python()).with_name(f"{process}.fork").read_text())
    return process


def write_script(original: Path, folder: Path) -> Path:
    """Copies a script of a virtual environment into a folder, to be run by `warm_python()`."""
    first, _, rest = original.read_text().partition("\n")
    assert first.startswith("#!"), first
    script = folder / original.name
    script.write_text(f"#!{warm_python()}\n{rest}")
    script.chmod(0o755)
    return script


def _running() -> Iterator[tuple[Path, int, int]]:
    """The folder in /proc, the parent and the session of each process that is no zombie."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, *fields = (path / "stat").read_text().rpartition(")")[2].split()
            if state not in "ZX":
                yield path, int(fields[0]), int(fields[2])


def members(session: int) -> dict[int, str]:
    """The processes of a session that are no zombies, and their command lines."""
    commands = {}
    for path, _, of in _running():
        if of == session:
            with contextlib.suppress(OSError):
                commands[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return commands


def members_and_forks(session: int) -> set[int]:
    """The processes of a session, their children, the forks for which they stand, and those of the latter."""
    running = {int(path.name): {parent, of} for path, parent, of in _running()}
    reached: set[int] = set()
    pending = {session}
    while pending:
        reached |= pending
        forks = {fork_of(process) for process in pending}
        pending = (forks | {process for process, of in running.items() if of & pending}) - reached
    return reached & running.keys()


@dataclass(frozen=True)
class Request:
    """What a fork becomes."""

    process: int
    arguments: list[str]
    unbuffered: bool
    files: list[int]
    environment: dict[str, str]
    folder: str
    ignored: list[int]
    umask: int
    powers: int


def main() -> None:
    folder = Path(sys.argv[1])
    sys.executable = str(folder / "python")
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in LATE & set(sys.modules):
        del sys.modules[name]
        delattr(sys.modules["fedlight"], name.partition(".")[2])
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in a fork"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        listener.listen(64)
        gc.collect()
        gc.freeze()
        (folder / "ready").touch()
        request, files = serve(listener, folder)
    become(request, files)
    end_as_the_interpreter_would(functools.partial(run_program, request.arguments))


def end_as_the_interpreter_would(program: Callable[[], None]) -> None:
    """Runs a program to the end of the process, which unloads no library: that takes seconds."""
    status = 0
    try:
        program()
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
        status = 1
        if isinstance(error, KeyboardInterrupt):
            status = -signal.SIGINT
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def serve(listener: socket.socket, folder: Path) -> tuple[Request, list[int]]:
    """Forks for every request, and notes which fork it is; returns in each fork only."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, "listener")
    selector.register(0, selectors.EVENT_READ, "end")
    children: dict[int, tuple[int, socket.socket]] = {}  # pidfd: process, connection
    while True:
        for key, _ in selector.select():
            if key.data == "end":
                for process, _ in children.values():
                    os.kill(process, signal.SIGKILL)
                os._exit(0)
            elif key.data == "listener":
                connection, _ = listener.accept()
                request = receive(connection)
                if request is None:
                    connection.close()
                    continue
                process = os.fork()
                if process == 0:
                    for descriptor, (_, other) in children.items():
                        os.close(descriptor)
                        other.close()
                    connection.close()
                    selector.close()
                    return request
                (folder / f"{request[0].process}.fork").write_text(str(process))
                for file in request[1]:
                    os.close(file)
                descriptor = os.pidfd_open(process)
                children[descriptor] = process, connection
                selector.register(descriptor, selectors.EVENT_READ, "child")
                selector.register(connection, selectors.EVENT_READ, descriptor)
                with contextlib.suppress(OSError):
                    connection.sendall(process.to_bytes(8, "little"))
            elif key.data == "child":
                process, connection = children.pop(key.fd)
                _, status = os.waitpid(process, 0)
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                selector.unregister(key.fd)
                os.close(key.fd)
                with contextlib.suppress(OSError):
                    connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
                connection.close()
            elif key.data in children:  # the client was killed
                selector.unregister(key.fileobj)
                os.kill(children[key.data][0], signal.SIGKILL)


def receive(connection: socket.socket) -> tuple[Request, list[int]] | None:
    """A request and its open files; None where the caller has ended."""
    length, files, _, _ = socket.recv_fds(connection, 8, 250)
    content = b""
    while len(content) < int.from_bytes(length, "little"):
        if not (part := connection.recv(2**20)):
            return None
        content += part
    return (Request(**json.loads(content)), files) if content else None


def become(request: Request, files: list[int]) -> None:
    """Turns a fork into the requested program."""
    os.setsid()
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, 1000) for file in files]
    for file in files:
        os.close(file)
    for file in {0, 1, 2} - set(request.files):
        os.close(file)
    for file, number in zip(high, request.files, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)
    for ignored in request.ignored:
        signal.signal(ignored, signal.SIG_IGN)
    if signal.SIGINT not in request.ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    limit_powers(request.powers)
    os.umask(request.umask)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    unbuffered = request.unbuffered or bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        before = getattr(sys, name)
        with contextlib.suppress(OSError):  # closed by the caller
            stream = os.fdopen(number, mode, encoding=before.encoding, errors=before.errors, closefd=False)
            stream.reconfigure(line_buffering=name == "stderr", write_through=unbuffered)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    random.seed()
    sys.modules["numpy"].random.seed()
    tempfile.tempdir = None
    os.getppid = functools.partial(parent_of, request.process)
    given = os.environ.get("PYTHONPATH", "")
    sys.path[:] = [*(path for path in given.split(os.pathsep) if path), *sys.path[1:]]
    if any(Path(path, "sitecustomize.py").exists() for path in sys.path):
        importlib.import_module("sitecustomize")


def limit_powers(powers: int) -> None:
    """Gives up all capabilities, for ever, that are not among `powers`, a bit for each."""
    held = read_powers()
    if not held & ~powers:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(held.bit_length()):
        if held & ~powers & 1 << number:
            assert libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    version_and_process = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    low, high = powers & held & 0xFFFFFFFF, (powers & held) >> 32
    sets = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)  # effective, permitted, inheritable
    assert libc.capset(version_and_process, sets) == 0, os.strerror(ctypes.get_errno())


def run_program(arguments: list[str]) -> None:
    """Runs it as `__main__`."""
    kind, *more = arguments
    if not os.environ.get("PYTHONSAFEPATH"):
        folders = {"-m": os.getcwd(), "-c": ""}
        sys.path.insert(0, folders[kind] if kind in folders else str(Path(kind).resolve().parent))
    if kind == "-m":
        sys.argv[:] = ["-m", *more[1:]]
        sys.orig_argv[:] = [sys.executable, *arguments]
        runpy._run_module_as_main(more[0])  # type: ignore[attr-defined]
    elif kind == "-c":
        sys.argv[:] = ["-c", *more[1:]]
        run_as_main(more[0], "<string>")
    else:
        sys.argv[:] = arguments
        run_as_main(Path(kind).read_text(encoding="utf-8"), kind)


def run_as_main(code: str, path: str) -> None:
    module: Any = type(sys)("__main__")
    module.__dict__.update(__builtins__=__builtins__, __spec__=None)
    if path != "<string>":
        module.__file__ = path
    sys.modules["__main__"] = module
    exec(compile(code, path, "exec", dont_inherit=True), module.__dict__)


def parent_of(process: int) -> int:
    """The parent of a process; 1 where it has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 1


if __name__ == "__main__":
    main()
