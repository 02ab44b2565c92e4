"""The evaluation of a round in a process of its own, while the next round trains."""

import gc
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from loky import ProcessPoolExecutor
from loky.process_executor import BrokenProcessPool

from fedlight.config import CellConfig
from fedlight.experiment.clients import make_site
from fedlight.experiment.evaluate import evaluate_models
from fedlight.experiment.parts import CHECKPOINT, CellParts
from fedlight.experiment.setup import make_cell_server, set_up
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.grouping import group_evaluations
from fedlight.federation.site import Site
from fedlight.federation.transport.worker import LOOK, begin
from fedlight.loggers.bars import ProgressBars
from fedlight.runtime.errors import Damaged
from fedlight.runtime.usage import Usage, UsageMeter

LOSSES = 3  # of the process in one cell, after which the cell's own process evaluates
LOST = "fedlight: the process that evaluates was killed, perhaps for its memory; the round is evaluated again"


class Scored(NamedTuple):
    """The evaluation of a round.

    Attributes:
        fid: as `evaluate_models` returns it.
        seconds: that it took.
        usage: of the process that did it.
    """

    fid: dict[str, Any] | None
    seconds: float
    usage: Usage


@dataclass(frozen=True)
class EvaluationTask:
    """Evaluates the models of a cell as they are stored in its folder; can be pickled.

    Attributes:
        config: of the cell.
        folder: of the cell, absolute.
        noise: multiplier of the noise.
    """

    config: CellConfig
    folder: Path
    noise: float

    def __call__(self, round_: int) -> Scored:
        """Evaluates the models after a round, whose checkpoint the cell has stored.

        Raises:
            Damaged: the checkpoint cannot be read.
            MemoryLost: what a client kept is gone.
            Diverged: the images of a model are not finite.
        """
        opened = EVALUATION_CACHE.get(self)
        started, folder = time.perf_counter(), self.folder
        server = make_cell_server(folder.name, opened.parts)
        server.resume(ServerCheckpoint(folder / CHECKPOINT, folder.name, repair=False), before=round_ + 1)
        if server.round != round_:
            raise Damaged(f"{folder / CHECKPOINT}/server-r{round_:04d} is missing or damaged")
        bars = ProgressBars(folder.name, self.config.rounds)  # never entered, so that it draws no bar

        def ask_clients(requests: Any) -> Any:
            for group in group_evaluations(requests, opened.site.setup):
                yield from opened.site.evaluate_group(group)

        evaluator = opened.parts.model_evaluator
        fid = evaluate_models(folder, server, ask_clients, evaluator, bars, lambda: None)
        return Scored(fid, time.perf_counter() - started, opened.usage())


@dataclass(frozen=True)
class OpenedCell:
    """A cell's parts and clients in the process that evaluates."""

    parts: CellParts
    site: Site
    meter: UsageMeter

    def usage(self) -> Usage:
        """What the process has used for this cell."""
        return self.meter.read(self.parts.drawing.take())


class EvaluationCache:
    """Keeps the parts of the cell that this process evaluated last."""

    def __init__(self) -> None:
        self._made: tuple[EvaluationTask, OpenedCell] | None = None
        self._name = f"evaluation-{uuid4().hex}"

    def get(self, task: EvaluationTask) -> OpenedCell:
        """The parts of the task's cell."""
        if self._made is None or self._made[0] != task:
            self._made = None  # frees the memory of the other model first
            meter = UsageMeter(self._name)
            parts = set_up(task.config, noise=task.noise)
            self._made = task, OpenedCell(parts, make_site(parts, task.folder), meter)
            gc.enable()
        return self._made[1]


EVALUATION_CACHE = EvaluationCache()


def prepare(task: EvaluationTask) -> None:
    """Makes the parts of the cell, so that the first round finds them."""
    EVALUATION_CACHE.get(task)


class ProcessCache:
    """Keeps the process that evaluates between the cells of a command."""

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Starts work in the process, which is started where there is none, and ends with this one."""
        if self._executor is None:
            self._executor = ProcessPoolExecutor(1, initializer=begin, initargs=(os.getpid(),))
        try:
            return self._executor.submit(work, *arguments)
        except BrokenProcessPool:  # it was killed while it was idle
            self.end()
            return self.submit(work, *arguments)

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)
            self._executor = None


PROCESS_CACHE = ProcessCache()


class BackgroundEvaluation:
    """Evaluates one round after the other in a process of its own.

    Where that process is killed, the round is evaluated again.

    Args:
        task: of the cell.
        check: raises an exception where the cell is to end; called while it waits.
    """

    def __init__(self, task: EvaluationTask, check: Callable[[], None]) -> None:
        self._task = task
        self._check = check
        self._losses = 0
        self._future: Future[Any] | None = PROCESS_CACHE.submit(prepare, task)
        self.round: int | None = None

    def start(self, round_: int) -> None:
        """Starts the evaluation of a round, which is stored."""
        self.round = round_
        self._future = PROCESS_CACHE.submit(self._task, round_)

    def collect(self) -> Scored:
        """Waits for the evaluation that was started last.

        Raises:
            Damaged, MemoryLost, Diverged: as the task does.
        """
        assert self._future is not None
        assert self.round is not None
        while True:
            while not self._future.done():
                wait([self._future], LOOK)
                self._check()
            if not isinstance(self._future.exception(), BrokenProcessPool):
                break
            PROCESS_CACHE.end()
            self._check()  # a signal to the whole process group ends this process, too
            print(LOST, file=sys.stderr)
            self._losses += 1
            if self._losses == LOSSES:
                return self._task(self.round)
            self._future = PROCESS_CACHE.submit(self._task, self.round)
        scored: Scored = self._future.result()
        return scored

    def forget(self) -> None:
        """Drops an evaluation that was started; the next one may begin at once."""
        if self._future is not None and not self._future.done():
            PROCESS_CACHE.end()
        self.round = self._future = None
