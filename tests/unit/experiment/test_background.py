"""The process that evaluates rounds in the background: how it is waited for, lost and ended."""

from collections.abc import Callable, Container
from concurrent.futures import Future
from typing import Any

import pytest
from loky.process_executor import BrokenProcessPool

from fedlight.experiment import background
from fedlight.experiment.background import LOST, BackgroundEvaluation, Scored
from fedlight.runtime.errors import Diverged
from fedlight.runtime.usage import Usage

USAGE = Usage("", None, None, 0.0)


def score(round_: int) -> Scored:
    """An evaluation of a round."""
    if round_ == 13:
        raise Diverged("its images are not finite")
    return Scored({"value": float(round_)}, 1.0, USAGE)


class Process:
    """Evaluates at once, in this process; the submissions of the given numbers end in a loss."""

    def __init__(self, losses: Container[int] = (), ends: bool = True) -> None:
        self.losses, self.ends, self.submitted, self.ended = losses, ends, 0, 0

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.submitted += 1
        if not self.ends:
            return future
        if self.submitted - 1 in self.losses:
            future.set_exception(BrokenProcessPool())
        else:
            try:
                future.set_result(None if work is background.prepare else work(*arguments))
            except Diverged as error:
                future.set_exception(error)
        return future

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[BackgroundEvaluation, Process]]:
    def call(
        check: Callable[[], None] = lambda: None, **options: Any
    ) -> tuple[BackgroundEvaluation, Process]:
        process = Process(**options)
        monkeypatch.setattr(background, "PROCESS_CACHE", process)
        task: Any = score
        return BackgroundEvaluation(task, check), process

    return call


@pytest.mark.parametrize(("losses", "lost"), [((), 0), ({1}, 1), ({1, 2}, 2), (range(1, 99), 3)])
def test_a_round_whose_process_was_killed_is_evaluated_again_and_after_three_losses_here(
    begin: Callable[..., Any], capfd: pytest.CaptureFixture[str], losses: Container[int], lost: int
) -> None:
    evaluation, process = begin(losses=losses)
    evaluation.start(4)
    assert evaluation.round == 4
    assert evaluation.collect() == score(4)
    assert capfd.readouterr().err.splitlines() == [LOST] * lost
    assert process.ended == lost


def test_an_error_of_the_evaluation_is_the_error_of_the_cell(begin: Callable[..., Any]) -> None:
    evaluation, _ = begin()
    evaluation.start(13)
    with pytest.raises(Diverged, match="not finite"):
        evaluation.collect()


def test_a_signal_ends_the_wait_and_the_process(begin: Callable[..., Any]) -> None:
    def check() -> None:
        raise KeyboardInterrupt

    evaluation, process = begin(check, ends=False)
    evaluation.start(4)
    with pytest.raises(KeyboardInterrupt):
        evaluation.collect()
    evaluation.forget()
    assert (evaluation.round, process.ended) == (None, 1)


def test_nothing_is_ended_where_nothing_is_under_way(begin: Callable[..., Any]) -> None:
    evaluation, process = begin()
    evaluation.start(4)
    evaluation.collect()
    evaluation.forget()
    assert process.ended == 0
