"""Clients that train in one batched computation (trainer.fuse) against the same clients one by one.

python benchmarks/fuse.py [--quick] [--case NAME ...] [--out FILE.json]

Each cell is a command of its own, alone and fused in turns, on all cores (transport=processes). Updates per
second are those of the rounds after the first one, in which workers still load their libraries; peak memory
is that of the command's largest process.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, composed, parser, show, write

from fedlight.federation.cohort import cohort_size

BARE = ("evaluation.samples=0", "evaluation.grid=0", "logger=none")
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "1,000 clients of 14 digits": (
        25,
        (
            *("clients=1000", "fraction=0.2", "rounds=3", "epochs=1"),
            *("data.source._target_=many_digits.load", "+data.source.copies=10"),
        ),
    ),
    "near_central, K=5": (3, ("experiment=near_central", "clients=5", "rounds=30")),
    "near_central, K=10": (5, ("experiment=near_central", "clients=10", "rounds=30")),
    "default cell": (3, ("rounds=3", "epochs=2")),
    "make demo, a cell on one core": (
        5,
        (
            *("experiment=better", "partition=shards", "partition.classes=2", "clients=5", "rounds=6"),
            *("epochs=1", "model.conditional=true", "trainer.workers=1"),
        ),
    ),
    "client-level privacy, 100 clients": (25, ("privacy=client", "clients=100", "rounds=4", "epochs=1")),
}
"""Case: trainer.fuse, which leaves a group to each core, and the overrides of its cell."""


def run(arguments: tuple[str, ...]) -> dict[str, float]:
    """Runs a cell in a process of its own.

    Returns:
        The seconds of a round after the first one, and the peak memory in MiB.
    """
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "fedlight.run", *arguments, f"output={output}"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
        process = subprocess.Popen(command, cwd=output, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed")
        (path,) = Path(output).glob("*/*/rounds.csv")
        with path.open(encoding="utf-8", newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        return {"seconds": statistics.mean(seconds[1:]), "MiB": usage.ru_maxrss / 1024}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--case", action="append", choices=CASES, help="only this case; may be repeated")
    given = arguments.parse_args()
    rows, ratios, figures = [], {}, {}
    for case in given.case or CASES:
        fuse, overrides = CASES[case]
        _, config = composed(*BARE, *overrides)
        updates = cohort_size(config.clients, config.fraction)
        variants = {"alone": (), "fused": (f"trainer.fuse={fuse}",)}
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for _ in range(1 if given.quick else 2):
            for name, more in variants.items():
                measured[name].append(run((*BARE, *overrides, *more)))
        medians: dict[str, dict[str, Any]] = {
            name: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "MiB")}
            for name, runs in measured.items()
        }
        ratios[f"fuse, {case}"] = ratio = medians["alone"]["seconds"] / medians["fused"]["seconds"]
        figures[case] = {**medians, "updates_a_round": updates}
        rows.append(
            [
                case,
                str(fuse),
                *(f"{updates / medians[name]['seconds']:.1f}" for name in variants),
                f"{ratio:.2f}x",
                *(f"{medians[name]['MiB']:.0f}" for name in variants),
            ]
        )
        print(*rows[-1], sep="  ", file=sys.stderr)
    show(
        "updates per second, transport=processes",
        ["", "trainer.fuse", "alone", "fused", "ratio", "MiB alone", "MiB fused"],
        rows,
    )
    write(given.out, ratios, {"cases": figures})


if __name__ == "__main__":
    main()
