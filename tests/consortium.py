"""A real consortium on this machine: a SuperLink and SuperNodes with TLS and node keys, on loopback."""

import json
import os
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from fedlight.experiment.agreement import agreed_hash

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PROGRAMS = ("flower-superlink", "flower-supernode", "flwr")
STARTED = "Uvicorn running"
PATIENT = (  # a process that Flower starts has 30 s to be there, too few on a busy machine
    "import flwr.common.constant as constant; constant.HEARTBEAT_DEFAULT_INTERVAL = 300; "
)
SUPERLINK = [
    sys.executable,
    "-c",
    f"{PATIENT}from flwr.superlink.cli import flower_superlink; flower_superlink()",
]
SUPERNODE = [
    sys.executable,
    "-c",
    f"{PATIENT}from flwr.supernode.cli import flower_supernode; flower_supernode()",
]


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
        home = folder / "home"
        home.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
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

    def start_superlink(self) -> None:
        tls = "--ssl-ca-certfile ca.pem --ssl-certfile server.pem --ssl-keyfile server.key"
        options = (
            f"--host 127.0.0.1 --port {self.port} --enable-supernode-auth --database {self.folder}/flower.db "
            f"{tls} --disable-runtime-dependency-installation"
        )
        begun = self.log("superlink").count(STARTED)
        self._spawn("superlink", [*SUPERLINK, *options.split()])
        until(lambda: self.log("superlink").count(STARTED) > begun, 300)

    def start_node(
        self,
        app: Path,
        client: int,
        key: str,
        ca: str = "ca",
        port: int = 0,
        acts: dict[int, str] | None = None,
    ) -> None:
        """Starts a SuperNode.

        Args:
            app: that `fedlight deploy init` wrote.
            client: the institution's number.
            key: the name of its key, of its log and of its memory's folder.
            ca: the authority that it trusts.
            port: where it reaches the SuperLink, 0 for the SuperLink's own.
            acts: round: how it misbehaves.
        """
        agreed = agreed_hash(app / "federation" / "cell.yaml")
        config = f'client={client} agreed="{agreed}" memory="{self.folder / key}"'
        options = (
            f"--superlink 127.0.0.1:{port or self.port} --host 127.0.0.1 --port {free_port()} "
            f"--root-certificates {ca}.pem --auth-supernode-private-key {key}.key"
        )
        bad = {"PYTHONPATH": f"{ROOT / 'tests' / 'misbehaving'}:{ROOT}", "MISBEHAVE": json.dumps(acts)}
        command = [*SUPERNODE, *options.split(), "--node-config", config]
        self._spawn(key, command, bad if acts else {})

    def kill(self, name: str) -> None:
        """Ends a SuperNode or the SuperLink at once, without a word."""
        self.processes[name].kill()
        self.processes[name].wait()

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

    def said(self) -> list[str]:
        """The lines that the server printed, as `flwr log` shows them."""
        with closing(sqlite3.connect(self.folder / "flower.db")) as database:
            found = database.execute("SELECT log FROM task_logs").fetchall()
        return [line for (text,) in found for line in text.splitlines()]

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self, name: str) -> None:
        """Ends a SuperNode or the SuperLink as Ctrl-C would."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop(self) -> None:
        for name in [*self.processes]:
            self.end(name)

    def _spawn(self, name: str, command: list[str], more: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment | (more or {}),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def _do(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


class Tap:
    """Between a node and the SuperLink: TLS ends here, what the node sends is kept, and goes on over TLS.

    Args:
        folder: with the authority's and the server's certificates.
        port: of the SuperLink.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.sent = bytearray()
        self._to = ("127.0.0.1", port)
        self._serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._serving.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._calling = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._carry, args=self._listener.accept()[:1], daemon=True).start()

    def _carry(self, caller: socket.socket) -> None:
        """One connection: bytes of the node and of the SuperLink in turns, as HTTP/1.1 has them."""
        with suppress(OSError):
            raw = socket.create_connection(self._to)
            node = self._serving.wrap_socket(caller, server_side=True)
            link = self._calling.wrap_socket(raw, server_hostname="127.0.0.1")
            back = threading.Thread(target=self._copy, args=(link, node, None), daemon=True)
            back.start()
            self._copy(node, link, self.sent)

    def _copy(self, source: ssl.SSLSocket, to: ssl.SSLSocket, kept: bytearray | None) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                if kept is not None:
                    kept += content
                to.sendall(content)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


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
