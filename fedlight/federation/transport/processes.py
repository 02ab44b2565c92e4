"""Clients in several processes of one machine, which loky keeps for all cells of a command."""

import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import active_children
from typing import Any

from loky import get_reusable_executor
from loky.process_executor import BrokenProcessPool

from fedlight.federation.grouping import group_evaluations, make_groups
from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update
from fedlight.federation.site import Site
from fedlight.federation.transport.scheduler import Request, WorkersLost, answer_in_order
from fedlight.federation.transport.tasks import answer, prepare, write
from fedlight.federation.transport.transport import Monitor, TransportContext
from fedlight.federation.transport.worker import begin
from fedlight.runtime.usage import UsageLog

AHEAD = 2  # tasks that a worker has at once: one under way, and the next, so that it need not wait
IDLE = 600  # seconds without work after which loky ends a worker
LOSSES = 3  # of workers in one cell, after which this process continues alone
LOST = "fedlight: a process that trains clients was killed, perhaps for its memory; its task is done again"


class Processes:
    """Trains clients in this process and in workers beside it.

    Args:
        context: of the cell.
        workers: processes that train, this one included; None for as many as the machine has room for.
    """

    def __init__(self, context: TransportContext, workers: int | None = None) -> None:
        total = min(workers or context.max_workers, context.server.participation.cohort_size)
        self._context = context
        self._pool = LokyPool(max(1, total) - 1, context.make_site, context.monitor, context.usage)

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        site = self._context.site
        for receipts in self._answers(make_groups(broadcasts, site.setup)):
            yield from (site.read(receipt) for receipt in receipts if receipt)

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        for scores in self._answers(group_evaluations(requests, self._context.site.setup)):
            yield from scores

    def _answers(self, messages: Iterable[Request]) -> Iterator[Any]:
        context = self._context
        return answer_in_order(enumerate(messages), self._pool, context.monitor, context.site.answer)


class LokyPool:
    """Workers of loky. Where one is killed, all are ended, and their tasks are done again by new ones.

    Args:
        workers: number of worker processes.
        make_site: makes the site of the cell in a worker.
        monitor: of the cell; a signal to the whole process group ends workers, too.
        usage: takes the workers' reports on their memory and time.
    """

    def __init__(
        self, workers: int, make_site: Callable[[], Site], monitor: Monitor, usage: UsageLog
    ) -> None:
        self.workers = workers
        self._make_site = make_site
        self._monitor = monitor
        self._usage = usage
        self._losses = 0
        for _ in range(workers):  # they load the libraries while this process already works
            self._submit(prepare, make_site)

    def capacity(self) -> int:
        return AHEAD * self.workers

    def submit(self, message: Request) -> Future[Any]:
        return self._submit(answer, self._make_site, write(message))

    def result(self, future: Future[Any], message: Request) -> Any:
        if isinstance(future.exception(), BrokenProcessPool):
            end_workers()  # all of them: loky may leave one that it had just started
            self._monitor.check()
            print(LOST, file=sys.stderr)
            self._losses += 1
            if self._losses == LOSSES:
                self.workers = 0
            raise WorkersLost
        answered, usage = future.result()
        self._usage.note(usage)
        return answered

    def check(self) -> None:
        """`result` notices lost workers."""

    def stop(self, futures: Collection[Future[Any]]) -> None:
        end_workers()

    def _submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        try:
            return EXECUTOR_CACHE.get(self.workers).submit(task, *arguments)
        except BrokenProcessPool:  # a worker was killed while it was idle
            end_workers()
            return EXECUTOR_CACHE.get(self.workers).submit(task, *arguments)


class ExecutorCache:
    """Keeps loky's executor between cells, so that the next cell finds its workers."""

    def __init__(self) -> None:
        self._executor: Any = None

    def get(self, workers: int) -> Any:
        """An executor with so many workers, each of which ends with this process."""
        self._executor = get_reusable_executor(
            workers, timeout=IDLE, initializer=begin, initargs=(os.getpid(),)
        )
        return self._executor

    def clear(self) -> None:
        """Ends the workers, if there are any, and waits for their end."""
        if self._executor is None:
            return
        self._executor.shutdown(wait=True, kill_workers=True)
        self._executor = None
        for process in active_children():
            if "Loky" in type(process).__name__ and process.pid:  # one that loky lost track of
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                process.join()


EXECUTOR_CACHE = ExecutorCache()


def end_workers() -> None:
    """Ends all worker processes of this process."""
    EXECUTOR_CACHE.clear()
