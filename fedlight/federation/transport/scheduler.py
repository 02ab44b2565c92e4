"""The scheduler of transports with workers: hands messages to them and yields the answers in order."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol, TypeAlias

from fedlight.federation.grouping import EvaluationGroup, Group, is_evaluation
from fedlight.federation.transport.transport import Monitor
from fedlight.federation.transport.worker import LOOK

Request: TypeAlias = Group | EvaluationGroup
Task: TypeAlias = tuple[int, Request]
"""The place of its answer in the results, from 0, and the messages of a group."""


class WorkersLost(Exception):
    """Workers ended before their tasks; all tasks that were submitted have to be submitted again."""


class WorkerPool(Protocol):
    """Processes that answer messages."""

    def capacity(self) -> int:
        """How many tasks may be submitted at once; where this process answers, too, two for each worker."""

    def submit(self, message: Request) -> Future[Any]:
        """Starts a task."""

    def result(self, future: Future[Any], message: Request) -> Any:
        """The answer of a task that has ended.

        Raises:
            WorkersLost: it has none, and the workers of all other tasks have ended, too.
        """

    def check(self) -> None:
        """Raises an error where the pool can no longer answer."""

    def stop(self, futures: Collection[Future[Any]]) -> None:
        """Ends tasks whose answers are not needed, after an error or an interruption."""


def answer_in_order(
    tasks: Iterable[Task],
    pool: WorkerPool,
    monitor: Monitor,
    answer_here: Callable[[Request], Any] | None = None,
) -> Iterator[Any]:
    """Yields the answers by number; tasks are started in the given order.

    A task is started again only where its worker was lost. The site finds an update that was finished before
    the loss in its journal, so that no update is done twice.

    Args:
        tasks: numbered from 0 without a gap, in any order.
        pool: of workers.
        monitor: counts the updates of workers, and may end the cell.
        answer_here: answers a task in this process, which takes one whenever the pool is full; None where
            this process only waits.
    """
    queue = deque(tasks)
    submitted: dict[Future[Any], Task] = {}
    answers: dict[int, Any] = {}
    next_number = 0
    try:
        while queue or submitted:
            while queue and len(submitted) < pool.capacity():
                if answer_here and len(queue) == 1 and 2 * len(submitted) >= pool.capacity():
                    break  # the workers are busy: this process begins with the last task earlier than they do
                task = queue.popleft()
                submitted[pool.submit(task[1])] = task
            if queue and answer_here:
                number, message = queue.popleft()
                answers[number] = answer_here(message)
            else:
                wait(submitted, LOOK, FIRST_COMPLETED)
            for future in [future for future in submitted if future.done()]:
                number, message = submitted.pop(future)
                try:
                    answers[number] = pool.result(future, message)
                except WorkersLost:
                    lost = [(number, message), *submitted.values()]
                    queue.extendleft(sorted(lost, key=_number, reverse=True))
                    submitted.clear()
                    break
                for _ in () if is_evaluation(message) else message:
                    monitor.end_update()
            monitor.check()
            pool.check()
            while next_number in answers:
                yield answers.pop(next_number)
                next_number += 1
    except BaseException:
        pool.stop(submitted)
        raise


def _number(task: Task) -> int:
    return task[0]
