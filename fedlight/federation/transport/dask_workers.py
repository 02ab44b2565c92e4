"""Dask's scheduler and workers: those at an address, or our own, which end with the cell."""

import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import dask
from distributed import Client, LocalCluster, Security, Worker, WorkerPlugin
from distributed.utils import get_ip

from fedlight.federation.transport.worker import SIGNALS
from fedlight.runtime.errors import BadInput

ANSWER = 10  # seconds that a scheduler has to answer
SETTLED = 60  # seconds after which ended workers are an error, not the end of the job
END = 10  # seconds that workers on other nodes have to end
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")
OURS = {
    "distributed.nanny.pre-spawn-environ": dict.fromkeys(THREADS),  # inherited: the bits depend on them
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "logging": {"distributed": "error"},
}
"""Dask's configuration for our own scheduler and workers."""
NAMED = ("sh", "-c", 'trap "" USR1 USR2; exec "$0" "$@" --name "$SLURM_NODEID"')


Check: TypeAlias = Callable[[], None]
"""Raises ConnectionError where our workers have ended before the cell."""


@contextmanager
def connected(address: str) -> Iterator[tuple[Client, Check]]:
    """Connects to a running scheduler; TLS is set up by Dask's own configuration.

    Raises:
        BadInput: no scheduler answers there.
    """
    _silence()
    try:
        client = Client(address, timeout=ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"transport.address: no scheduler of Dask answers at {address}") from error
    with client:
        yield client, lambda: None


@contextmanager
def started(workers: int, gpus: int) -> Iterator[tuple[Client, Check]]:
    """Starts a scheduler in this process, with workers, and connects to it.

    The workers are on this machine, where they listen on the loopback interface only, or on all nodes of the
    SLURM job of this process. All connections use TLS with a key that is made for this cell.

    Args:
        workers: number of processes on each node.
        gpus: number of GPUs of each node.
    """
    _silence()
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    host = "127.0.0.1" if nodes == 1 else os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or get_ip()
    security = Security.temporary()
    tls = {f"distributed.comm.tls.{name}": pem for name, pem in _pems(security).items()}
    with (
        dask.config.set(OURS | tls),
        LocalCluster(
            n_workers=workers if nodes == 1 else 0,
            threads_per_worker=1,
            host=host,
            protocol="tls://",
            security=security,
            dashboard_address=f"{host}:0",
            scheduler_kwargs={"dashboard": False},
            memory_limit=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_plugin(WorkerSetup(gpus))
        if nodes == 1:
            yield client, lambda: None
            return
        with _on_nodes(nodes, workers, cluster.scheduler_address) as check:
            yield client, check


def _silence() -> None:
    """Silences Dask's loggers; the transport reports errors."""
    for name in ("distributed", *logging.root.manager.loggerDict):
        if name.partition(".")[0] == "distributed":
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _pems(security: Security) -> dict[str, str]:
    pems: dict[str, str] = {}
    for role in ("scheduler", "worker", "client"):
        tls = security.get_tls_config_for_role(role)
        pems |= {"ca-file": tls["ca_file"], f"{role}.key": tls["key"], f"{role}.cert": tls["cert"]}
    return pems


@contextmanager
def _on_nodes(nodes: int, workers: int, address: str) -> Iterator[Check]:
    """Starts workers on the nodes of this SLURM job, in a job step beside that of the cell."""
    kept = ("SLURM_CONF", "SLURM_JOB_ID")  # the other variables are those of this process's own step
    environment = {
        key: value for key, value in os.environ.items() if key in kept or not key.startswith("SLURM_")
    }
    environment["DASK_INTERNAL_INHERIT_CONFIG"] = dask.config.serialize(dask.config.global_config)
    step = ["srun", "--overlap", "--kill-on-bad-exit=0", f"--nodes={nodes}", f"--ntasks={nodes}"]
    begin = [sys.executable, "-m", "distributed.cli.dask_worker", address, f"--nworkers={workers}"]
    options = ["--nthreads=1", "--memory-limit=0", "--no-dashboard", "--death-timeout=60"]
    process = subprocess.Popen([*step, *NAMED, *begin, *options], env=environment, stdin=subprocess.DEVNULL)
    alive = time.monotonic()

    def check() -> None:
        nonlocal alive
        if (status := process.poll()) is None:
            alive = time.monotonic()
        elif time.monotonic() - alive > SETTLED:
            raise ConnectionError(
                f"transport=dask: the workers on the nodes ended, srun with status {status}"
            )

    try:
        yield check
    finally:
        process.terminate()
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            process.kill()


def call(pickled: bytes) -> Any:
    """Calls a pickled function; unpickled here, its imports run in the thread of the task."""
    function, *arguments = pickle.loads(pickled)  # noqa: S301  # Dask unpickles anyway
    return function(*arguments)


class WorkerSetup(WorkerPlugin):
    """Sets up one of our workers: its GPU, and signals that it ignores; ends it without delay."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus

    def setup(self, worker: Worker) -> None:
        gc.disable()  # until the first task has imported the libraries
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))
            number = int(str(worker.name).rpartition("-")[2])
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % self.gpus]

    def teardown(self, worker: Worker) -> None:
        """Ends the process at once: its libraries take seconds to unload."""
        os._exit(0)
