"""The scheduler of transports with workers, on pools that need no process."""

from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loky.process_executor import BrokenProcessPool
from toy import Quiet

from fedlight.federation.cohort import Participation
from fedlight.federation.grouping import EvaluationGroup
from fedlight.federation.messages import Broadcast, Evaluation, Payload, to_bytes
from fedlight.federation.transport import processes, tasks
from fedlight.federation.transport.processes import LOST, LokyPool, Processes
from fedlight.federation.transport.scheduler import WorkersLost, answer_in_order
from fedlight.federation.transport.transport import TransportContext
from fedlight.runtime.stopwatch import Stopwatch


def requests(number: int = 6) -> Iterator[Evaluation]:
    return (Evaluation("cell", 1, client, 0, False, {}) for client in range(number))


def groups(number: int = 6) -> Iterator[EvaluationGroup]:
    """The requests, each a group."""
    return ((request,) for request in requests(number))


class Watch:
    """A monitor that counts updates, and may end the cell at a check."""

    def __init__(self, end_at: int | None = None) -> None:
        self.updates, self.checks, self.end_at = 0, 0, end_at

    def end_update(self) -> None:
        self.updates += 1

    def check(self) -> None:
        self.checks += 1
        if self.checks == self.end_at:
            raise KeyboardInterrupt


def client_of(message: Any) -> int:
    """The first client of a group."""
    return message[0].client


class Manual:
    """A pool of two workers whose tasks end when the test says so; it loses its workers at some messages."""

    def __init__(self, lost: Container[int] = ()) -> None:
        self.lost, self.started, self.stopped = set(lost), [], 0  # type: ignore[call-overload]
        self.futures: list[Future[int]] = []

    def capacity(self) -> int:
        return 2

    def submit(self, message: Any) -> Future[int]:
        self.started.append(client_of(message))
        self.futures.append(Future())
        self.futures[-1].set_result(self.started[-1])
        return self.futures[-1]

    def result(self, future: Future[int], message: Any) -> int:
        if client_of(message) in self.lost:
            self.lost.discard(client_of(message))
            raise WorkersLost
        return future.result()

    def check(self) -> None:
        pass

    def stop(self, futures: Any) -> None:
        self.stopped += 1


def test_answers_come_in_the_order_of_their_numbers_and_tasks_start_in_the_order_given() -> None:
    pool, numbered = Manual(), list(enumerate(groups()))
    answers = answer_in_order(reversed(numbered), pool, Quiet())
    assert list(answers) == [0, 1, 2, 3, 4, 5]
    assert pool.started == [5, 4, 3, 2, 1, 0]
    assert pool.stopped == 0


def test_tasks_of_lost_workers_are_started_again_and_finished_ones_are_not() -> None:
    pool = Manual(lost={2})
    assert list(answer_in_order(enumerate(groups()), pool, Quiet())) == [0, 1, 2, 3, 4, 5]
    assert pool.started == [0, 1, 2, 3, 2, 3, 4, 5]


def test_the_updates_of_workers_are_counted_and_evaluations_and_updates_of_this_process_are_not() -> None:
    broadcasts = [(Broadcast("cell", 1, client, 0, (), False, {}),) for client in range(6)]
    monitor = Watch()
    assert len(list(answer_in_order(enumerate(broadcasts), Manual(), monitor, lambda message: 0))) == 6
    assert monitor.updates == 4
    assert list(answer_in_order(enumerate(groups()), Manual(), monitor)) == [0, 1, 2, 3, 4, 5]
    assert monitor.updates == 4


def test_a_pool_is_stopped_where_the_cell_ends_or_its_reader_goes_away() -> None:
    pool = Manual()
    with pytest.raises(KeyboardInterrupt):
        list(answer_in_order(enumerate(groups()), pool, Watch(end_at=2)))
    assert pool.stopped == 1
    answers = answer_in_order(enumerate(groups()), pool, Quiet())
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert pool.stopped == 2


def test_an_error_of_a_task_ends_the_cell() -> None:
    pool = Manual()
    pool.result = lambda future, message: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        list(answer_in_order(enumerate(groups()), pool, Quiet()))
    assert pool.stopped == 1


def test_no_message_needs_no_worker() -> None:
    assert list(answer_in_order([], Manual(), Quiet())) == []


# --- processes of this machine


class Executor:
    """In place of loky's: does a task at once, but for those with these numbers, at which a worker dies."""

    def __init__(self, deaths: Container[int] = ()) -> None:
        self.deaths, self.count = deaths, 0

    def get(self, workers: int) -> "Executor":
        return self

    def clear(self) -> None:
        pass

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.count in self.deaths:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(task(*arguments))
        self.count += 1
        return future


def place(name: str) -> Any:
    setup = SimpleNamespace(drawing=Stopwatch(), drawn_together=1)
    return SimpleNamespace(
        answer=lambda group: [(name, request.client) for request in group],
        discard=lambda: None,
        setup=setup,
    )


def processes_of(
    monkeypatch: pytest.MonkeyPatch, executor: Any, cohort: int = 6, monitor: Any = None, **sizes: Any
) -> Processes:
    """The transport of a cell; its site in this process answers `here`, that of a worker `there`."""
    monkeypatch.setattr(processes, "EXECUTOR_CACHE", executor)
    monkeypatch.setattr(tasks, "SITE_CACHE", tasks.SiteCache())
    server: Any = SimpleNamespace(participation=Participation(cohort, 1.0, 0.0, 0))
    sizes = {"max_workers": 2, "workers": None, **sizes}
    there = place("there")
    context = TransportContext(
        place("here"), lambda: there, sizes["max_workers"], server, monitor or Quiet(), ExitStack()
    )
    return Processes(context, sizes["workers"])


@pytest.mark.parametrize(
    ("cohort", "max_workers", "workers", "expected"),
    [(5, 8, None, 4), (2, 8, None, 1), (1, 8, None, 0), (9, 2, 4, 3)],
)
def test_there_are_no_more_workers_than_clients_of_a_round(
    monkeypatch: pytest.MonkeyPatch, cohort: int, max_workers: int, workers: int | None, expected: int
) -> None:
    executor = Executor()
    processes_of(monkeypatch, executor, cohort, max_workers=max_workers, workers=workers)
    assert executor.count == expected  # each makes its site beforehand


def test_a_worker_has_two_tasks_while_this_process_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = list(processes_of(monkeypatch, Executor()).evaluate(requests()))
    assert answers == list(zip(["there", "there", "here"] * 2, range(6), strict=True))


@pytest.mark.parametrize(("number", "expected"), [(1, "t"), (2, "th"), (3, "tth"), (4, "tthh")])
def test_this_process_takes_the_last_task_where_the_worker_is_busy(
    monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    class Slow(Executor):
        def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            Timer(0.3, lambda: future.set_result(task(*arguments))).start()
            return future

    answers = list(processes_of(monkeypatch, Slow(), workers=2).evaluate(requests(number)))
    assert "".join(name[0] for name, _ in answers) == expected  # type: ignore[misc]


def test_payloads_that_broadcasts_share_are_sent_once_and_shared_again() -> None:
    shared = {"encoder": Payload.plain({"w": torch.arange(6.0)})}
    group = tuple(
        Broadcast("cell", 2, client, 1, ("encoder",), False, dict(shared) if client == 2 else shared)
        for client in range(4)
    )
    written = tasks.write(group)
    assert [like for _, like in written] == [0, 0, 2, 0]
    received = tasks.read(written)
    assert [to_bytes(message) for message in received] == [to_bytes(message) for message in group]
    assert received[3].payloads is received[0].payloads is not received[2].payloads


def test_a_pool_that_broke_while_it_was_idle_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Executor):
        ended = 0

        def clear(self) -> None:
            self.ended += 1

        def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
            if not self.ended:
                raise BrokenProcessPool
            return super().submit(task, *arguments)

    executor = Broken()
    answers = processes_of(monkeypatch, executor).evaluate(requests())
    assert [client for _, client in answers] == list(range(6))  # type: ignore[misc]
    assert executor.ended == 1


@pytest.mark.parametrize(("deaths", "losses"), [({1}, 1), ({2}, 1), ({1, 3}, 2), (range(1, 99), 3)])
def test_tasks_of_a_killed_worker_are_done_again_and_after_three_losses_in_this_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], deaths: Container[int], losses: int
) -> None:
    answers: list[Any] = list(processes_of(monkeypatch, Executor(deaths)).evaluate(requests()))
    assert [client for _, client in answers] == list(range(6))
    assert [name for name, _ in answers].count("there") > 0 or losses == 3
    assert capfd.readouterr().err.splitlines() == [LOST] * losses


def test_a_signal_that_ended_a_worker_ends_the_cell_without_a_message_of_loss(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    transport = processes_of(monkeypatch, Executor({1}), monitor=Watch(end_at=1))
    with pytest.raises(KeyboardInterrupt):
        list(transport.evaluate(requests()))
    assert capfd.readouterr().err == ""


def test_workers_end_with_a_cell_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    transport = processes_of(monkeypatch, Executor())
    monkeypatch.setattr(processes, "end_workers", lambda: ended.append(1))
    assert isinstance(transport._pool, LokyPool)
    monkeypatch.setattr(transport._pool, "result", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(transport.evaluate(requests()))
    assert ended == [1]


def test_a_worker_makes_the_site_of_a_cell_once() -> None:
    made: list[str] = []

    def one() -> Any:
        made.append("one")
        return "site of one"

    def two() -> Any:
        made.append("two")
        return "site of two"

    cache, seen = tasks.SiteCache(), []
    for make_site in (one, one, two, two, one):
        with cache.opened(make_site) as site:
            seen.append(site)
    assert made == ["one", "two", "one"]
    assert seen == [f"site of {name}" for name in ("one", "one", "two", "two", "one")]
