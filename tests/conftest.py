"""Fixtures: cells made through the command line, in this process, and real Fashion-MNIST."""

import csv
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: small tensors, busy machines

from fedlight import run
from fedlight.data.fmnist import DEBIAN

SMALL = ["logger=none", "data.limit=120", "rounds=2", "epochs=1", "evaluation.steps=2", "evaluation.grid=4"]


@dataclass(frozen=True)
class Cell:
    """A finished cell, read back from its files."""

    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    def rows(self, table: str) -> list[dict[str, str]]:
        with (self.folder / table).open(newline="") as file:
            return list(csv.DictReader(file))


def invoke(*arguments: str) -> int:
    """Runs `python -m fedlight.run ARGUMENTS` in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedlight.run", *arguments])
        with pytest.raises(SystemExit) as stop:
            run.main()
    return int(stop.value.code or 0)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `python -m fedlight.run ARGUMENTS` in `tmp_path`; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    return invoke


@pytest.fixture
def cells(command: Callable[..., int], tmp_path: Path) -> Callable[..., list[Cell]]:
    """Runs a small command that must succeed; returns the cells of its sweep in order of their names."""

    def call(*arguments: str) -> list[Cell]:
        assert command(*SMALL, *arguments) == 0
        names = [argument.split("=")[1] for argument in arguments if argument.startswith("name=")]
        sweep = tmp_path / "runs" / (names[0] if names else "default")
        return [Cell(path.parent) for path in sorted(sweep.glob("*/result.json"))]

    return call


@pytest.fixture
def cell(cells: Callable[..., list[Cell]]) -> Callable[..., Cell]:
    """Runs a small cell under a sweep name of its own and returns it."""
    count = 0

    def call(*arguments: str) -> Cell:
        nonlocal count
        count += 1
        (made,) = cells(f"name=cell{count}", *arguments)
        return made

    return call


@pytest.fixture(scope="session")
def fmnist() -> None:
    """Real Fashion-MNIST, from the Debian package dataset-fashion-mnist."""
    if not DEBIAN.is_dir():
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure: what CI is meant to run must have run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
