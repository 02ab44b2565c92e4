"""A real consortium on this machine: a SuperLink and SuperNodes with TLS and node keys, on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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

    def start_node(self, app: Path, client: int, key: str, ca: str = "ca") -> None:
        """Starts a SuperNode.

        Args:
            app: that `fedlight deploy init` wrote.
            client: the institution's number.
            key: the name of its key, of its log and of its memory's folder.
            ca: the authority that it trusts.
        """
        agreed = agreed_hash(app / "federation" / "cell.yaml")
        config = f'client={client} agreed="{agreed}" memory="{self.folder / key}"'
        options = (
            f"--superlink 127.0.0.1:{self.port} --host 127.0.0.1 --port {free_port()} "
            f"--root-certificates {ca}.pem --auth-supernode-private-key {key}.key"
        )
        self._spawn(key, [*SUPERNODE, *options.split(), "--node-config", config])

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

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def _do(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


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
