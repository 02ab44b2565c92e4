"""Clients that train at once: helping processes that do local updates beside this one, to the same bits."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlight.runtime.memory import no_garbage

if TYPE_CHECKING:  # they bring torch, and the command line is to answer at once
    from fedlight.federation.cohort import Task
    from fedlight.federation.store import Files

LOOK = 0.2  # seconds between two looks at signals while others work
SPAWN = multiprocessing.get_context("spawn")  # a fork has neither CUDA nor OpenMP
LOST = "fedlight: a process that trains clients was killed, perhaps for its memory; the cell goes on without"
DEAF = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # for the main process, which sees to its helpers


@dataclass(frozen=True)
class Order:
    """What a helper is told of a local update; the tensors are in the checkpoint.

    Attributes:
        folder: of the cell.
        config: its configuration, resolved.
        task: what to do.
        files: where the client finds what it needs.
    """

    folder: Path
    config: dict[str, Any]
    task: Task
    files: Files


class Crew:
    """This process and its helpers, which live until `dismiss`, for one cell after another.

    Args:
        helpers: processes beside this one; they load the libraries while this one is at work already.
    """

    def __init__(self, helpers: int) -> None:
        self.helpers = helpers
        self._stop = SPAWN.RawValue(ctypes.c_bool, False)  # no lock that a killed helper might keep
        self._pool = self._start()
        self._ready: list[Future[None]] = []

    def get_ready(self, folder: Path, config: dict[str, Any]) -> None:
        """Lets the helpers load the libraries and build a cell; this process may begin without them."""
        try:
            self._ready = [self._pool.submit(_prepare, folder, config) for _ in range(self.helpers)]
        except BrokenProcessPool:  # one was killed in a cell before
            self._pool = self._start()
            self._ready = [self._pool.submit(_prepare, folder, config) for _ in range(self.helpers)]

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.helpers, SPAWN, _begin, (self._stop,))

    def train(
        self,
        tasks: Sequence[Task],
        here: Callable[[Task], None],
        order: Callable[[Task], Order],
        done: Callable[[Task], None],
        check: Callable[[], None],
    ) -> list[tuple[Task, Files]]:
        """Does tasks of the cell that the helpers were made ready for, each by whoever is free.

        Where a helper is killed, this process does all that is left.

        Args:
            tasks: in the order in which they are begun.
            here: does a task in this process.
            order: what a helper is to be told of a task.
            done: told of each task that a helper has done, in a thread of its own.
            check: may end it all by an exception, now and then.

        Returns:
            The tasks that helpers did, and the files that they wrote.

        Raises:
            Exception: of the first task that failed, in the order given.
        """
        waiting, lock = deque(tasks), threading.Lock()
        running: dict[Task, Future[Files | None]] = {}

        def hand_out() -> None:
            with lock:
                if not waiting:
                    return
                task = waiting[0]
                try:
                    running[task] = future = self._pool.submit(_update, order(task))
                except BrokenProcessPool:
                    return
                waiting.popleft()
            future.add_done_callback(lambda ended: finish(task, ended))

        def finish(task: Task, ended: Future[Files | None]) -> None:
            if ended.exception() is None:
                done(task)
                hand_out()
            elif not _is_lost(ended):
                waiting.clear()

        try:
            for ready in self._ready:  # a helper that still loads joins in when it is done
                ready.add_done_callback(lambda _: hand_out())
            while True:
                with lock:
                    task = waiting.popleft() if waiting else None
                if task is None:
                    break
                here(task)
            while wait(running.values(), LOOK).not_done:
                check()
            lost = [task for task in tasks if task in running and _is_lost(running[task])]
            if lost:
                print(LOST, file=sys.stderr)
            for task in lost:
                del running[task]
                here(task)
            found = [(task, running[task].result()) for task in tasks if task in running]
        except BaseException:
            with lock:
                waiting.clear()
            self._stop.value = True
            wait(running.values())
            self._stop.value = False
            raise
        return [(task, files) for task, files in found if files is not None]

    def end(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.kill()


def _is_lost(future: Future[Any]) -> bool:
    """Whether the process that was to do it was killed."""
    return isinstance(future.exception(), BrokenProcessPool)


_crew: Crew | None = None


def crew_of(helpers: int) -> Crew:
    """The crew of this process, with that many helpers."""
    global _crew
    if _crew is None or _crew.helpers != helpers:
        dismiss()
        _crew = Crew(helpers)
    return _crew


def dismiss() -> None:
    """Ends the helpers, if there are any, wherever they are."""
    global _crew
    if _crew is not None:
        _crew.end()
        _crew = None


_stop: ctypes.c_bool
_helper: Any = None  # of the cell that this process helped last


def _begin(stop: ctypes.c_bool) -> None:
    """The first thing that a helper does."""
    global _stop
    _stop = stop
    for name in DEAF:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _prepare(folder: Path, config: dict[str, Any]) -> None:
    """Makes this process ready for a cell."""
    global _helper
    with no_garbage():
        from fedlight.helper import Helper
    if _helper is None or _helper.folder != folder:
        _helper = Helper(folder, config, _stop)


def _update(order: Order) -> Files | None:
    """Does a local update; returns where everything is then, or None where it was stopped."""
    _prepare(order.folder, order.config)
    files: Files | None = _helper.update(order.task, order.files)
    return files
