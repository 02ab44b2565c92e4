"""Errors of commands: one line on stderr, and the exit status."""

import argparse
import sys

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from fedlight.command import describe_error, print_error, run_command
from fedlight.runtime.errors import BadInput, Damaged, Diverged, LeaseTaken


def status(monkeypatch: pytest.MonkeyPatch, outcome: BaseException | int | None) -> int:
    """The exit status of a command that raises or returns the outcome."""

    def command(word: str) -> int | None:
        assert word == "x"
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    parser = argparse.ArgumentParser()
    parser.add_argument("word")
    monkeypatch.setattr(sys, "argv", ["command", "x"])
    return run_command(parser, command)


@pytest.mark.parametrize(
    ("outcome", "expected", "line"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (BadInput("rounds:\nno"), 2, "rounds: no"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 2, "a.png: No such file or directory"),
        (Diverged("round 3"), 1, "round 3"),
        (Damaged("a file"), 1, "a file"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_of_a_command_is_one_line_and_a_status(
    outcome: BaseException | int | None,
    expected: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status(monkeypatch, outcome) == expected
    assert capsys.readouterr().err == (f"fedlight: error: {line}\n" if line else "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        status(monkeypatch, ZeroDivisionError())


def test_a_file_that_fails_in_a_cell_is_a_failure_and_a_missing_config_is_bad_input() -> None:
    assert print_error(PermissionError(13, "Permission denied", "runs")) == 1
    assert print_error(LeaseTaken("another process works on it")) == 1
    assert print_error(MissingConfigException("no such group", "method/FULLL")) == 2


def test_an_unknown_key_is_named_with_a_similar_key() -> None:
    config = OmegaConf.create({"trainer": {"threads": 1}})
    OmegaConf.set_struct(config, True)
    with pytest.raises(Exception, match="not in struct") as caught:
        OmegaConf.update(config, "trainer.thread", 2)
    assert describe_error(caught.value).endswith("did you mean trainer.threads?")
