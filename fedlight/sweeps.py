"""The cells of a sweep and their states: python -m fedlight.sweeps COMMAND runs/NAME."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedlight.command import run_command
from fedlight.runs.plan import LISTED, Launch, read_launches
from fedlight.runs.status import (
    CORRUPT,
    DONE,
    FAILED,
    INTERRUPTED,
    QUEUED,
    RUNNING,
    UNFINISHED,
    SweepCell,
    find_sweeps,
    read_sweep,
)
from fedlight.runtime.environment import load_environment
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import plain_line
from fedlight.runtime.process_record import is_alive
from fedlight.runtime.slurm_jobs import cancel as cancel_jobs

COLOURS = {DONE: "green", RUNNING: "cyan", FAILED: "red", CORRUPT: "red", INTERRUPTED: "yellow"}
WIDTH = 160  # in a file or a pipe, in characters
TIMEOUT = 20.0  # seconds for W&B's service to answer
INTERVAL = 5.0  # seconds between two updates of `status --watch`


def main() -> None:
    """Exits with 0, with 1 where a part of the work did not succeed, with 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m fedlight.sweeps", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sweep = argparse.ArgumentParser(add_help=False)
    sweep.add_argument("sweep", type=Path, help="folder of the sweep, such as runs/demo")

    shown = commands.add_parser("status", parents=[sweep], help="a table of the state of every cell")
    form = shown.add_mutually_exclusive_group()
    form.add_argument("--json", dest="as_json", action="store_true", help="for programs: a list of cells")
    form.add_argument("--watch", action="store_true", help="update every few seconds, until Ctrl-C")
    again = commands.add_parser("retry", parents=[sweep], help="run again what did not complete")
    again.add_argument(
        "overrides", nargs="*", help="added to the sweep's command, such as hydra.launcher.mem_gb=8"
    )
    again.add_argument(
        "--trust", action="store_true", help="run the sweep's command, whatever code or folder it names"
    )
    commands.add_parser("cancel", parents=[sweep], help="take its jobs from SLURM; what is done stays")
    commands.add_parser("sync", parents=[sweep], help="send its offline W&B runs")
    sys.exit(run_command(parser, call))


def call(command: str, sweep: Path, **arguments: Any) -> int:
    """Calls the function of a command with the cells of a sweep; returns the exit status."""
    load_environment()
    if command == "status" and (sweeps := find_sweeps(sweep)):
        return list_sweeps(sweeps)
    cells = _read_cells(sweep)
    if command == "status":
        return status(sweep, cells, **arguments)
    if command == "retry":
        return retry(sweep, cells, **arguments)
    return cancel(cells) if command == "cancel" else sync(sweep)


def _read_cells(sweep: Path) -> list[SweepCell]:
    if not sweep.is_dir():
        raise BadInput(f"{sweep} is no folder; a sweep lives in OUTPUT/NAME, such as runs/demo")
    cells = read_sweep(sweep)
    if not cells:
        inside = ", ".join(path.name for path in find_sweeps(sweep))
        hint = f"; the sweeps in it: {inside}" if inside else ""
        raise BadInput(f"{sweep} is no sweep: it holds neither a plan nor a cell{hint}")
    return cells


def list_sweeps(sweeps: Sequence[Path]) -> int:
    """Prints a line for each sweep."""
    for sweep in sweeps:
        print(_summary(sweep, read_sweep(sweep)))
    return 0


def status(sweep: Path, cells: list[SweepCell], as_json: bool = False, watch: bool = False) -> int:
    """Prints the state of every cell."""
    if as_json:
        print(json.dumps([cell.as_json() for cell in cells], indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if not watch:
        console.print(_view(sweep, cells))
        return 0
    with Live(_view(sweep, cells), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(INTERVAL)
            live.update(_view(sweep, read_sweep(sweep)), refresh=True)


def retry(sweep: Path, cells: list[SweepCell], overrides: Sequence[str], trust: bool) -> int:
    """Runs the commands again that planned the unfinished cells.

    Args:
        sweep: its folder, which may come from somebody else.
        cells: of the sweep.
        overrides: added to the commands.
        trust: whether the commands may name any code, and any folder to run in.

    Raises:
        BadInput: a command is not trusted, and names code that fedlight does not ship or another folder.
    """
    unfinished = {cell.cell for cell in cells if cell.state in UNFINISHED}
    if not unfinished:
        print(f"nothing to retry; {_summary(sweep, cells)}")
        return 0
    launches: list[Launch] = []
    for launch in reversed(read_launches(sweep)):
        if unfinished & launch.cells.keys():
            launches.append(launch)
            unfinished -= launch.cells.keys()
    for cell in sorted(unfinished):
        print(f"{cell}: no plan of a sweep names it; type its own command again", file=sys.stderr)
    for launch in launches:
        _check(sweep, launch, trust)
    environment = os.environ if trust else {**os.environ, LISTED: str(sweep.resolve()), "PYTHONSAFEPATH": "1"}
    codes = [1] if unfinished else [0]
    for launch in launches:
        if is_alive(launch.process, silence=float("inf")):
            print(f"{launch.process} still works on the other cells of its sweep", file=sys.stderr)
            codes.append(1)
            continue
        command = [sys.executable, "-m", "fedlight.run", *launch.command, *overrides]
        codes.append(subprocess.run(command, cwd=launch.folder, env=environment).returncode)
    return max(codes)


def _check(sweep: Path, launch: Launch, trust: bool) -> None:
    """Raises BadInput where the command of a launch cannot be run, or needs --trust."""
    from fedlight.experiment.received_command import check_command

    try:
        if not trust:
            check_command(launch.command)
            if Path(launch.folder).resolve() != Path.cwd().resolve():
                raise BadInput(f"it was typed in {launch.folder}: type this there")
    except BadInput as error:
        raise BadInput(
            f"{sweep}: the command that planned it: {error}; --trust runs it, so know where the sweep is from"
        ) from error
    if not Path(launch.folder).is_dir():
        raise BadInput(f"{sweep}: the folder {launch.folder}, where its command was typed, is not here")


def cancel(cells: list[SweepCell]) -> int:
    """Takes the queued and running jobs of the sweep from SLURM."""
    present = [cell for cell in cells if cell.state in (QUEUED, RUNNING)]
    jobs = [cell.job for cell in present if cell.job is not None]
    refusal = cancel_jobs(jobs) if jobs else None
    print(f"{len(jobs)} jobs cancelled" if refusal is None else f"scancel: {refusal}")
    for cell in present:
        if cell.job is None:
            print(
                f"{cell.cell}: {cell.state}, but no job of SLURM; stop the process that runs it",
                file=sys.stderr,
            )
    return 1 if refusal is not None or len(jobs) < len(present) else 0


def sync(sweep: Path) -> int:
    """Sends the offline W&B runs with W&B's own command line, which marks the runs that it has sent."""
    runs = sorted(sweep.glob("*/wandb/offline-run-*/*.wandb"))
    unsent = [run for run in runs if not _sent(run)]
    if unsent:
        _check_service(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
        command = [sys.executable, "-m", "wandb", "sync", *(str(run.parent) for run in unsent)]
        subprocess.run(command, env={**os.environ, "WANDB_MODE": "online"})
    left = [run for run in unsent if not _sent(run)]
    print(f"{len(unsent) - len(left)} offline W&B runs sent, {len(runs) - len(unsent)} had been before")
    for run in left:
        print(f"not sent: {run.parent}", file=sys.stderr)
    return 1 if left else 0


def _check_service(url: str) -> None:
    """Raises BadInput where W&B's service does not answer; W&B's command line would wait for ever."""
    try:
        urlopen(url, timeout=TIMEOUT).close()
    except HTTPError:
        pass  # an answer
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{url} cannot be reached from here ({error}): sync from a node with internet"
        ) from error


def _sent(run: Path) -> bool:
    return run.with_name(f"{run.name}.synced").exists()


def _summary(sweep: Path, cells: Sequence[SweepCell]) -> str:
    counts = Counter(cell.state for cell in cells)
    return f"{sweep}: {len(cells)} cells: {', '.join(f'{count} {state}' for state, count in counts.items())}"


def _view(sweep: Path, cells: list[SweepCell]) -> Group:
    table = Table()
    table.add_column("cell", overflow="fold")
    table.add_column("state")
    table.add_column("round", justify="right")
    table.add_column("time left", justify="right")
    table.add_column("job")
    table.add_column("heartbeat", justify="right")
    table.add_column("error", overflow="fold")
    for cell in cells:
        table.add_row(
            escape(plain_line(cell.cell)),
            f"[{COLOURS.get(cell.state, 'default')}]{cell.state}",
            f"{cell.round}/{'?' if cell.rounds is None else cell.rounds}",
            "" if cell.eta is None else str(timedelta(seconds=round(cell.eta))),
            cell.job or "",
            "" if cell.heartbeat is None else f"{datetime.fromtimestamp(cell.heartbeat):%H:%M:%S}",
            escape(plain_line(cell.error or "")),
        )
    return Group(Text(_summary(sweep, cells)), table)


if __name__ == "__main__":
    main()
