"""Functions that all benchmarks share: measuring in turns, the table, the JSON file."""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fedlight.compose import compose_config
from fedlight.config import CellConfig, validate
from fedlight.runtime.machine import describe_machine

ROOT = Path(__file__).parents[1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of every benchmark."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer repeats, for a first look")
    made.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return made


def composed(*overrides: str) -> tuple[DictConfig, CellConfig]:
    """The configuration of a cell, as the command line would compose it."""
    config = compose_config(overrides)
    return config, validate(config)


def typed(*arguments: str, sign: str = "") -> str:
    """The output of `python ARGUMENTS`, run in an empty folder; it must contain `sign`."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "WANDB_MODE": "offline"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    if done.returncode or sign not in done.stdout:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def in_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each, measured in turns, so that other work on the machine affects all alike.

    Each is called once before, unmeasured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, act in variants.items():
            begun = time.perf_counter()
            act()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints one table with the first column aligned to the left."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def write(out: Path | None, ratios: Mapping[str, float], figures: Mapping[str, Any]) -> None:
    """Writes the figures; `bench.py` compares the `ratios` between machines, greater is better."""
    if out is None:
        return
    written = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**describe_machine(), "python": platform.python_version(), "torch": torch.__version__},
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        **figures,
    }
    out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
