"""A real consortium on this machine: a SuperLink and SuperNodes with TLS and node keys, on loopback."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from forkserver import fork_of, members_and_forks, warm_python, write_script
from torch import Tensor

from fedlight.deployment.agreement import hash_agreement
from fedlight.federation.messages import Update, from_bytes

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
TAP = SUPPORT / "tapped"
BIN = Path(sys.executable).parent
PROGRAMS = ("flower-superexec", "flwr-serverapp", "flwr-clientapp", "flwr")
STARTED = "Uvicorn running"
REQUEST = b"POST /v1/fleet/"  # what each of a SuperNode's requests begins with
NO_POWERS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
"""Makes root a user like any other, who cannot read what others keep for themselves."""


def missing() -> str | None:
    """Why there can be no consortium here, if so."""
    absent = [program for program in PROGRAMS if not (BIN / program).exists()]
    absent += [program for program in ("openssl", "ssh-keygen") if shutil.which(program) is None]
    return f"no {', '.join(absent)}" if absent else None


class Consortium:
    """One SuperLink; institutions join and leave.

    Args:
        folder: of everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        home, scripts = folder / "home", folder / "bin"
        for made in (home, scripts):
            made.mkdir(parents=True)
        for program in PROGRAMS:
            write_script(BIN / program, scripts)
        self.environment = {
            **os.environ,
            "PATH": f"{scripts}:{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
        }
        self.make_certificate("ca", "server")
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.pem"}"\n'
        )

    def make_certificate(self, authority: str, server: str) -> None:
        """An authority and a certificate of it for 127.0.0.1."""
        new = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj"]
        ca, ca_key = f"{authority}.pem", f"{authority}.key"
        self._do([*new, "/CN=authority", "-x509", "-days", "2", "-keyout", ca_key, "-out", ca])
        self._do([*new, "/CN=server", "-keyout", f"{server}.key", "-out", f"{server}.csr"])
        (self.folder / "names").write_text("subjectAltName=IP:127.0.0.1")
        sign = ["openssl", "x509", "-req", "-in", f"{server}.csr", "-CA", ca, "-CAkey", ca_key]
        self._do([*sign, "-CAcreateserial", "-days", "2", "-out", f"{server}.pem", "-extfile", "names"])

    def make_key(self, name: str, register: bool = True) -> None:
        """A node's key, known to the SuperLink or not."""
        self._do(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"{name}.key"])
        if register:
            self._do(["flwr", "supernode", "register", f"{name}.key.pub", "test"])

    def fingerprint(self, name: str) -> str:
        """Of a node's key, as OpenSSH prints it."""
        show = ["ssh-keygen", "-lf", f"{name}.key.pub"]
        shown = subprocess.run(show, cwd=self.folder, check=True, capture_output=True, text=True)
        return shown.stdout.split()[1]

    def start_superlink(self) -> None:
        tls = "--ssl-ca-certfile ca.pem --ssl-certfile server.pem --ssl-keyfile server.key"
        options = (
            f"--host 127.0.0.1 --port {self.port} --enable-supernode-auth --database {self.folder}/flower.db "
            f"{tls} --disable-runtime-dependency-installation"
        )
        begun = self.log("superlink").count(STARTED)
        command = [*NO_POWERS, warm_python(), str(SUPPORT / "superlink.py"), *options.split()]
        self._spawn("superlink", command, self.environment)
        until(lambda: self.log("superlink").count(STARTED) > begun, 300)

    def start_node(
        self,
        app: Path,
        client: int,
        key: str,
        ca: str = "ca",
        home: Path | None = None,
        heartbeat: int = 300,
        stops_at: str = "",
    ) -> None:
        """Starts a SuperNode, whose processes write down what they send.

        Args:
            app: that `fedlight deploy init` wrote.
            client: the institution's number.
            key: the name of its key and of its log.
            ca: the authority that it trusts.
            home: where it keeps its memory and, if it has any of its own, its `images`.
            heartbeat: seconds; after twice that without one, it counts as away.
            stops_at: round and message at which the institution stops for good, such as `2 share list`.
        """
        home = home or self.folder / key
        agreed = hash_agreement(app / "federation" / "cell.yaml")
        config = f'client={client} agreed="{agreed}" memory="{home / "memory"}"'
        config += f' key="{self.folder / key}.key"'
        config += f' data-root="{home / "images"}"' if (home / "images").exists() else ""
        options = (
            f"--superlink 127.0.0.1:{self.port} --host 127.0.0.1 --port {free_port()} "
            f"--root-certificates {ca}.pem --auth-supernode-private-key {key}.key"
        )
        environment = {
            **self.environment,
            "PYTHONPATH": f"{ROOT}:{TAP}",
            "TAPPED": str(self.sent(app, key).folder),
            "FEDLIGHT_CACHE": str(home / "cache"),
            "STOPS_AT": stops_at,
        }
        command = [warm_python(), str(SUPPORT / "supernode.py"), str(heartbeat), *options.split()]
        self._spawn(key, [*command, "--node-config", config], environment)

    def sent(self, app: Path, key: str) -> "Sent":
        """What the processes of a node sent while they served an app."""
        return Sent(self.folder / "sent" / f"{app.parent.name}-{key}")

    def submit(self, app: Path) -> None:
        """Starts the cell of an app, or goes on with it."""
        self._do(["flwr", "run", str(app), "test", "--run-config", f'output="{self.runs(app)}"'])

    def runs(self, app: Path) -> Path:
        """The folder of the results of an app."""
        return self.folder / "runs" / app.parent.name

    def result(self, app: Path) -> dict[str, object]:
        """Waits for the end of the cell of an app."""
        until(lambda: list(self.runs(app).glob("*/*/result.json")), 900)
        (path,) = self.runs(app).glob("*/*/result.json")
        found: dict[str, object] = json.loads(path.read_text())
        return found

    def rows(self, app: Path, table: str) -> list[dict[str, str]]:
        """A table of the cell of an app, as far as it is written."""
        text = "".join(path.read_text() for path in self.runs(app).glob(f"*/*/{table}"))
        return list(csv.DictReader(text.splitlines()))

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def server_log(self) -> str:
        """What the server's process printed, as the SuperLink stored it."""
        return "".join(path.read_bytes().decode(errors="replace") for path in self.folder.glob("flower.db*"))

    def end(self, name: str) -> None:
        """Ends a SuperNode or the SuperLink as Ctrl-C would, and then what it leaves."""
        self.processes[name].terminate()
        with suppress(subprocess.TimeoutExpired):
            self.processes[name].wait(20)
        self.kill(name)

    def process(self, name: str) -> int:
        """The process of a SuperNode or of the SuperLink."""
        return fork_of(self.processes[name].pid)

    def kill(self, name: str) -> None:
        """Ends a SuperNode or the SuperLink, with the processes of its session, as a power cut would."""
        fork, process = self.process(name), self.processes.pop(name)
        for member in members_and_forks(process.pid) | members_and_forks(fork):
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for name in [*self.processes]:
            self.end(name)

    def _spawn(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _do(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


@contextmanager
def consortium_of_three(folder: Path) -> Iterator[Consortium]:
    """A SuperLink, and the keys node0, node1 and node2 of three institutions; nothing is left of it."""
    with consortium_of(folder, 3) as found:
        yield found


@contextmanager
def consortium_of(folder: Path, institutions: int) -> Iterator[Consortium]:
    """A SuperLink, and the keys of so many institutions; nothing is left of it."""
    found = Consortium(folder)
    try:
        found.start_superlink()
        for client in range(institutions):
            found.make_key(f"node{client}")
        yield found
    finally:
        found.stop()


@dataclass(frozen=True)
class Sent:
    """What the processes of an institution sent, as `tapped` wrote it down before it was encrypted."""

    folder: Path

    def requests(self) -> list[bytes]:
        """All HTTP requests, with their headers."""
        found = []
        for path in self.folder.glob("*.sent"):
            nothing, *requests = path.read_bytes().split(REQUEST)
            assert not nothing
            found += [REQUEST + request for request in requests]
        return found

    def holds_any(self, images: Iterable[Tensor]) -> bool:
        """Whether the uint8 pixels of an image are among them, as they are or as a model sees them."""
        everything = b"".join(self.requests())
        forms = (form for x in images for form in (x, x.float() / 255, x.float() / 127.5 - 1))
        return any(form.numpy().tobytes() in everything for form in forms)

    def has_stopped(self) -> bool:
        """Whether the institution has received the message at which it stops."""
        return (self.folder / "stopped").exists()

    def addresses(self) -> set[str]:
        """Where to connections were opened."""
        return {line for path in self.folder.glob("*addresses") for line in path.read_text().splitlines()}


def update_in(request: bytes) -> Update | None:
    """The update that a request of a SuperNode carries, if it does."""
    from flwr.proto.message_pb2 import PushObjectRequest

    if not request.startswith(REQUEST + b"push-object"):
        return None
    pushed = PushObjectRequest.FromString(request.partition(b"\r\n\r\n")[2]).object_content
    kind, _, content = pushed.partition(b"\0")
    message = from_bytes(content) if kind.startswith(b"ArrayChunk") else None
    return message if isinstance(message, Update) else None


def until(happened: Callable[[], object], seconds: float) -> None:
    """Waits until something has happened; raises TimeoutError where it does not."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])
