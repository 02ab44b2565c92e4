"""Clients on the workers of Dask: of this machine, of all nodes of a SLURM job, or of any scheduler."""

import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from functools import partial
from typing import Any

from torch.cuda import device_count

from fedlight.federation.journal import Receipt
from fedlight.federation.messages import Broadcast, Evaluation, Message, Scores, Update, from_bytes, to_bytes
from fedlight.federation.site import Site
from fedlight.federation.transport.tasks import act, evaluate, update
from fedlight.federation.transport.transport import TransportContext
from fedlight.federation.transport.worker import LOOK
from fedlight.runtime.errors import BadInput, ClientFailed, Damaged, Diverged, format_error

try:
    from distributed import KilledWorker

    from fedlight.federation.transport.dask_workers import call, connected, started
except ImportError as error:
    raise BadInput("transport=dask: pip install 'fedlight[cluster]'") from error

GONE = "transport=dask: the scheduler is gone; the same command goes on after the last stored round"
NOBODY = "fedlight: transport=dask waits for a worker"


class Dask:
    """The server and Dask's scheduler are in this process, or that elsewhere; workers train.

    The client with most images comes first, to whoever is free, and a worker has one task at a time. Where a
    worker is lost, Dask hands its task to another. What clients keep, and their updates, are in the cell's
    folder, which all workers share: so any of them finds what another kept, a restart does as well, and only
    where an update lies crosses this process.

    Args:
        context: of the cell.
        workers: processes that train, on each node; None for as many as there is room for, one a GPU.
        address: of a scheduler that runs already, whose workers are used, however many they are.
    """

    def __init__(
        self, context: TransportContext, workers: int | None = None, address: str | None = None
    ) -> None:
        self._context = context
        gpus = device_count()
        room = min(workers or max(context.room, gpus), context.cohort)
        cluster = connected(address) if address else started(room, gpus)
        self._client, self._check = context.ending.enter_context(cluster)
        self._executor = self._client.get_executor(pure=False)
        self._looked, self._count = 0.0, 0

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        jobs = sorted(enumerate(broadcasts), key=lambda job: self._size(job[1]), reverse=True)
        receipts: Iterator[Receipt | None] = self._run(iter(jobs), update, self._context.done)
        yield from (from_bytes(receipt.read()) for receipt in receipts if receipt)

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        yield from self._run(enumerate(requests), evaluate, lambda: None)

    def _size(self, broadcast: Broadcast) -> int:
        """Images that a client will train on."""
        data = self._context.here.setup.data
        return 0 if broadcast.drops_out else data(broadcast.client).num_examples

    def _run(
        self,
        jobs: Iterator[tuple[int, Message]],
        task: Callable[[bytes, Site], Any],
        done: Callable[[], None],
    ) -> Iterator[Any]:
        """The results by number, 0 first; jobs begin in the sequence in which they come."""
        under_way: dict[Future[Any], Message] = {}
        numbers: dict[Future[Any], int] = {}
        results: dict[int, Any] = {}
        due, more = 0, True
        try:
            while more or under_way:
                while more and len(under_way) < self._workers():
                    if job := next(jobs, None):
                        asked = pickle.dumps((act, self._context.make_site, partial(task, to_bytes(job[1]))))
                        future = self._executor.submit(call, asked)
                        numbers[future], under_way[future] = job
                    else:
                        more = False
                for future in wait(under_way, LOOK, FIRST_COMPLETED).done:
                    results[numbers.pop(future)] = _result(future, under_way.pop(future))
                    done()
                self._context.check()
                self._check()
                if self._client.status != "running":
                    raise ConnectionError(GONE)
                while due in results:
                    yield results.pop(due)
                    due += 1
        finally:
            for future in under_way:
                future.cancel()

    def _workers(self) -> int:
        """How many workers there are now, or 1 where there is none: one may be waiting for work to begin."""
        if time.monotonic() - self._looked > LOOK:
            before, self._looked = self._count, time.monotonic()
            try:
                self._count = len(self._client.nthreads())
            except (OSError, RuntimeError, CancelledError):
                raise ConnectionError(GONE) from None
            if before and not self._count:
                print(NOBODY, file=sys.stderr)
        return max(1, self._count)


def _result(future: Future[Any], message: Message) -> Any:
    """What a task came to.

    Raises:
        ClientFailed: it failed, or killed worker after worker, and the error does not say for which client.
        ConnectionError: the scheduler was lost.
    """
    assert isinstance(message, Broadcast | Evaluation)
    who = f"client {message.client} failed in round {message.round}"
    try:
        return future.result()
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
