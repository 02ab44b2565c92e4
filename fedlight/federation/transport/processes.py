"""Clients at once, in several processes of one machine, which loky keeps for all cells of a command."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from typing import Any

from loky import get_reusable_executor
from loky.process_executor import BrokenProcessPool

from fedlight.federation.journal import Receipt
from fedlight.federation.messages import Broadcast, Evaluation, Message, Scores, Update, from_bytes, to_bytes
from fedlight.federation.site import Site
from fedlight.federation.transport.tasks import act, evaluate, prepare, update
from fedlight.federation.transport.transport import TransportContext
from fedlight.federation.transport.worker import LOOK, begin

AHEAD = 2  # tasks of a worker at once: one under way, one that it need not wait for
IDLE = 600  # seconds without work after which loky ends a worker
LOSSES = 3  # of workers in one cell, after which this process goes on alone
LOST = "fedlight: a process that trains clients was killed, perhaps for its memory; its task is done again"


@dataclass(frozen=True)
class Job:
    """A message for whoever is free: `here(message)` in this process, or `there(bytes, site)` in a worker."""

    message: Message
    here: Callable[[Any], Any]
    there: Callable[[bytes, Site], Any]


class Processes:
    """This process and workers beside it.

    Where a worker is killed, loky notices it, and what it was doing is done again: an update is either whole
    in the outbox, or it is not there.

    Args:
        context: of the cell.
        workers: processes that train, this one among them; None for as many as there is room for.
    """

    def __init__(self, context: TransportContext, workers: int | None = None) -> None:
        self._context = context
        self._workers = max(1, min(workers or context.room, context.cohort)) - 1
        self._losses = 0
        for _ in range(self._workers):  # they load the libraries while this process is at work already
            self._submit(prepare)

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        jobs = (Job(broadcast, self._context.here.update, update) for broadcast in broadcasts)
        receipts: Iterator[Receipt | None] = self._run(jobs, self._context.done)
        yield from (from_bytes(receipt.read()) for receipt in receipts if receipt)

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        jobs = (Job(request, self._context.here.evaluate, evaluate) for request in requests)
        yield from self._run(jobs, lambda: None)

    def _run(self, jobs: Iterable[Job], done: Callable[[], None]) -> Iterator[Any]:
        """The results of the jobs, first to last; `done` is called for each that a worker did."""
        coming: Iterator[tuple[int, Job]] = enumerate(jobs)
        under_way: dict[Future[Any], tuple[int, Job]] = {}
        results: dict[int, Any] = {}
        due, more = 0, True
        try:
            while more or under_way:
                for future in [future for future in under_way if future.done()]:
                    number, job = under_way.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        self._note_loss()
                        coming = _put_back(coming, [(number, job), *under_way.values()])
                        more = True
                        under_way.clear()
                        break
                    results[number] = future.result()
                    done()
                while more and len(under_way) < AHEAD * self._workers:
                    if following := next(coming, None):
                        task = partial(following[1].there, to_bytes(following[1].message))
                        under_way[self._submit(task)] = following
                    else:
                        more = False
                if more and (own := next(coming, None)):
                    results[own[0]] = own[1].here(own[1].message)
                else:
                    more = False
                    wait(under_way, LOOK, FIRST_COMPLETED)
                    self._context.check()
                while due in results:
                    yield results.pop(due)
                    due += 1
        except BaseException:
            end_workers()
            raise

    def _submit(self, task: Callable[[Site], Any]) -> Future[Any]:
        try:
            return _executor(self._workers).submit(act, self._context.make_site, task)
        except BrokenProcessPool:  # killed while it was idle
            end_workers()
            return _executor(self._workers).submit(act, self._context.make_site, task)

    def _note_loss(self) -> None:
        """Ends what is left of the pool: loky may leave a worker that it had just started."""
        end_workers()
        self._context.check()  # a signal to the whole group ends workers, too
        print(LOST, file=sys.stderr)
        self._losses += 1
        if self._losses == LOSSES:
            self._workers = 0


def _put_back(coming: Iterator[Any], taken: list[Any]) -> Iterator[Any]:
    yield from sorted(taken, key=lambda entry: entry[0])
    yield from coming


_workers: Any = None  # loky's executor, while there is one


def _executor(workers: int) -> Any:
    global _workers
    _workers = get_reusable_executor(workers, timeout=IDLE, initializer=begin, initargs=(os.getpid(),))
    return _workers


def end_workers() -> None:
    """Ends the workers of this process, if there are any, wherever they are."""
    global _workers
    if _workers is not None:
        _workers.shutdown(wait=True, kill_workers=True)
        _workers = None
        for process in active_children():
            if "Loky" in type(process).__name__ and process.pid:  # whose own kill is missing
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
