"""Clients on the workers of Dask: of this machine, of all nodes of a SLURM job, or of any scheduler."""

import pickle
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

from torch.cuda import device_count

from fedlight.federation.grouping import count_images, group_evaluations, make_groups
from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update, from_bytes
from fedlight.federation.site import Site
from fedlight.federation.transport.scheduler import Request, answer_in_order
from fedlight.federation.transport.tasks import answer, write
from fedlight.federation.transport.transport import TransportContext
from fedlight.federation.transport.worker import LOOK
from fedlight.runtime.errors import BadInput, ClientFailed, Damaged, Diverged, format_error
from fedlight.runtime.usage import UsageLog

try:
    from distributed import Client, KilledWorker

    from fedlight.federation.transport.dask_workers import call, connected, started
except ImportError as error:
    raise BadInput("transport=dask: pip install 'fedlight[cluster]'") from error

GONE = "transport=dask: the scheduler is gone; the same command continues after the last stored round"
NO_WORKER = "fedlight: transport=dask waits for a worker"


class Dask:
    """Trains clients on workers; Dask's scheduler is in the process of the server, or at an address.

    The client, or the group of clients, with most images is started first, on any free worker, and a worker
    has one task at a time. Where a worker is lost, Dask gives its task to another one. The memory of clients
    and their updates are in the cell's folder, which all workers share, so that another worker, or a restart,
    finds them; only the path of an update is sent to this process.

    Args:
        context: of the cell.
        workers: processes that train, on each node; None for as many as there are cores or GPUs for.
        address: of a running scheduler, all of whose workers are used.
    """

    def __init__(
        self, context: TransportContext, workers: int | None = None, address: str | None = None
    ) -> None:
        gpus = device_count()
        limit = min(workers or max(context.max_workers, gpus), context.server.participation.cohort_size)
        cluster = connected(address) if address else started(limit, gpus)
        client, check = context.exit_stack.enter_context(cluster)
        self._context = context
        self._pool = DaskPool(client, check, context.make_site, context.usage)

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        setup = self._context.site.setup
        groups = make_groups(broadcasts, setup)
        tasks = sorted(enumerate(groups), key=lambda task: count_images(task[1], setup), reverse=True)
        for receipts in answer_in_order(tasks, self._pool, self._context.monitor):
            yield from (from_bytes(receipt.read()) for receipt in receipts if receipt)

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        groups = group_evaluations(requests, self._context.site.setup)
        for scores in answer_in_order(enumerate(groups), self._pool, self._context.monitor):
            yield from scores


class DaskPool:
    """The workers of a Dask scheduler, however many it has at the moment.

    Args:
        client: of the scheduler.
        check: raises ConnectionError where our own workers have ended before the cell.
        make_site: makes the site of the cell in a worker.
        usage: takes the workers' reports on their memory and time.
    """

    def __init__(
        self, client: Client, check: Callable[[], None], make_site: Callable[[], Site], usage: UsageLog
    ) -> None:
        self._client = client
        self._check_workers = check
        self._make_site = make_site
        self._usage = usage
        self._executor = client.get_executor(pure=False)
        self._looked, self._count = 0.0, 0

    def capacity(self) -> int:
        """The number of workers, or 1 where there is none: a worker may start only when a task waits."""
        if time.monotonic() - self._looked > LOOK:
            before, self._looked = self._count, time.monotonic()
            try:
                self._count = len(self._client.nthreads())
            except (OSError, RuntimeError, CancelledError):
                raise ConnectionError(GONE) from None
            if before and not self._count:
                print(NO_WORKER, file=sys.stderr)
        return max(1, self._count)

    def submit(self, message: Request) -> Future[Any]:
        return self._executor.submit(call, pickle.dumps((answer, self._make_site, write(message))))

    def result(self, future: Future[Any], message: Request) -> Any:
        """The answer of a task.

        Raises:
            ClientFailed: an error that does not name its client, or several workers were killed by it.
            ConnectionError: the scheduler was lost.
        """
        first, others = message[0], len(message) - 1
        clients = f"client {first.client}" + (f" or one of {others} computed with it" if others else "")
        who = f"{clients} failed in round {first.round}"
        try:
            answered, usage = future.result()
            self._usage.note(usage)
            return answered
        except CancelledError:
            raise ConnectionError(GONE) from None
        except KilledWorker as error:
            raise ClientFailed(
                f"{who}: it killed {error.allowed_failures + 1} workers, perhaps for their memory"
            ) from error
        except (BadInput, Damaged, Diverged, OSError):
            raise
        except Exception as error:
            raise ClientFailed(f"{who}: {format_error(error)}") from error

    def check(self) -> None:
        self._check_workers()
        if self._client.status != "running":
            raise ConnectionError(GONE)

    def stop(self, futures: Collection[Future[Any]]) -> None:
        for future in futures:
            future.cancel()
