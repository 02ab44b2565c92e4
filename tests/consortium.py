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


def missing() -> str | None:
    """Why there can be no consortium here, if so."""
    absent = [program for program in PROGRAMS if not (BIN / program).exists()]
    absent += [program for program in ("openssl", "ssh-keygen") if shutil.which(program) is None]
    return f"no {', '.join(absent)}" if absent else None


class Consortium:
    """One SuperLink; institutions join and leave.

    Args:
        folder: of everything.
        app: that `fedlight deploy init` wrote.
    """

    def __init__(self, folder: Path, app: Path) -> None:
        self.folder = folder
        self.app = app
        self.agreed = agreed_hash(app / "federation" / "cell.yaml")
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
            f"--host 127.0.0.1 --port {self.port} --enable-supernode-auth --database {self.folder}/flower.db"
        )
        self._spawn(
            "superlink", f"flower-superlink {options} {tls} --disable-runtime-dependency-installation".split()
        )
        until(lambda: "Uvicorn running" in self.log("superlink"), 120)

    def start_node(self, client: int, key: str, ca: str = "ca") -> None:
        config = f'client={client} agreed="{self.agreed}" memory="{self.folder / key}"'
        options = f"--superlink 127.0.0.1:{self.port} --host 127.0.0.1 --port {free_port()}"
        command = (
            f"flower-supernode {options} --root-certificates {ca}.pem --auth-supernode-private-key {key}.key"
        )
        self._spawn(key, [*command.split(), "--node-config", config])

    def run(self) -> dict[str, object]:
        """Has the one cell run to its end and returns its result.

        Flower gives a process 30 s to start; where the machine is too busy for that, the run is typed again,
        and goes on after its last stored round.
        """
        runs, late = self.folder / "runs", "task-token authentication failed"

        def missed() -> int:
            return self.log("superlink").count(late)

        for _ in range(3):
            before, deadline = missed(), time.monotonic() + 300
            self._do(["flwr", "run", str(self.app), "test", "--run-config", f'output="{runs}"'])
            while missed() == before and time.monotonic() < deadline:
                for path in runs.glob("*/*/result.json"):
                    found: dict[str, object] = json.loads(path.read_text())
                    return found
                time.sleep(0.5)
        raise TimeoutError

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

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
