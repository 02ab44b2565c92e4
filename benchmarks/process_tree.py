"""Runs a command and watches the memory of its process tree."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil

PERIOD = 0.5  # seconds between two looks at the processes


@dataclass(frozen=True)
class Run:
    """A finished command.

    Attributes:
        output: of the command.
        seconds: from its start to its end.
        peak_mb: greatest sum of the memory of its processes; a page that n of them share counts 1/n each
            (PSS), on Linux, elsewhere whole (RSS).
        peak_rss_mb: greatest sum of their resident sets, in which a shared page counts n times.
    """

    output: str
    seconds: float
    peak_mb: float
    peak_rss_mb: float


def memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes of a process: PSS (RSS where there is none), and RSS."""
    full = process.memory_full_info()
    return getattr(full, "pss", full.rss), full.rss


def run(
    command: Sequence[str],
    folder: str,
    environment: Mapping[str, str],
    each_look: Callable[[], object] = lambda: None,
) -> Run:
    """Runs a command in a folder; ends the program with the command's output if it fails.

    Args:
        command: program and arguments.
        folder: to run it in.
        environment: variables beside those of this process.
        each_look: called often while it runs.
    """
    peak, peak_rss = 0, 0
    log = Path(folder, "output.txt")
    begun = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
        )
    tree = psutil.Process(process.pid)
    ended = Event()

    def watch() -> None:
        nonlocal peak, peak_rss
        while not ended.wait(PERIOD):
            total = total_rss = 0
            with suppress(psutil.Error):
                for member in (tree, *tree.children(recursive=True)):
                    with suppress(psutil.Error):
                        pss, rss = memory(member)
                        total, total_rss = total + pss, total_rss + rss
            peak, peak_rss = max(peak, total), max(peak_rss, total_rss)

    watcher = Thread(target=watch)
    watcher.start()
    while process.poll() is None:
        each_look()
        time.sleep(0.02)
    each_look()
    seconds = time.perf_counter() - begun
    ended.set()
    watcher.join()
    output = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}\n{output[-4000:]}")
    return Run(output, seconds, peak / 2**20, peak_rss / 2**20)
