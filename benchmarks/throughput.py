"""The cost of an update of very many clients with few steps: fedlight's transports and Flower's simulation.

pip install -e '.[bench,cluster]' && python benchmarks/throughput.py [--quick] [--out FILE.json]

100,000 clients of one or two digits, of which 1,000 (with --quick 200) take one local epoch, a single step of
the tiny UNet, in each of two rounds; two worker processes. The second round is timed, inside each engine; the
steps by themselves in a bare loop. "Written" counts the writes of a run's processes to disk, without Ray's.
"""

import csv
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import flower_app
import torch
from common import parser, show, typed, write

CLIENTS, WORKERS = 100_000, 2
TRANSPORTS = ("processes", "dask")
SETTINGS = [f"clients={CLIENTS}", "rounds=2", "epochs=1", "logger=none", f"trainer.workers={WORKERS}"]
SETTINGS += ["evaluation.samples=0", "evaluation.grid=0"]
SETTINGS += ["data.source._target_=many_digits.load", "+data.source.copies=70"]


def measured(*command: str, sign: str) -> tuple[str, float]:
    """The output of a command, and the MB that its processes wrote to disk."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock
    printed = typed(*command, sign=sign)
    return printed, (resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock - before) * 512 / 1e6


def flower() -> tuple[float, float]:
    """Seconds of a round of Flower's simulation, and the MB written in its run."""
    printed, written = measured("-c", "import flower_app; flower_app.run()", sign="FINISHED")
    (line,) = (line for line in printed.splitlines() if line.startswith("FINISHED"))
    return json.loads(line.removeprefix("FINISHED"))["seconds"], written


def fedlight(config: Sequence[str], transport: str) -> tuple[float, float]:
    """Seconds of a round by that transport, and the MB written in its run."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "fedlight.run", *config, f"transport={transport}", f"output={folder}"]
        _, written = measured(*command, sign="loss 0.")
        (path,) = Path(folder).glob("*/*/rounds.csv")
        with path.open(encoding="utf-8") as file:
            return float(list(csv.DictReader(file))[-1]["seconds"]), written


def steps(updates: int) -> float:
    """Seconds of as many clients' steps, one after the other in one thread, without any engine."""
    torch.set_num_threads(1)
    flower_app.parts()
    begun = time.perf_counter()
    for client in range(updates):
        flower_app.fit(client)
    return time.perf_counter() - begun


def main() -> None:
    given = parser(__doc__).parse_args()
    updates = 200 if given.quick else 1_000
    config = [*SETTINGS, f"fraction={updates / CLIENTS}"]
    os.environ["SETTINGS"] = json.dumps(config)
    alone = steps(updates) / WORKERS
    found = {"Flower": flower(), **{name: fedlight(config, name) for name in TRANSPORTS}}
    theirs = found["Flower"][0]
    show(
        f"a round of {updates} updates of one step, {CLIENTS:,} clients, {WORKERS} processes",
        ["", "ms an update", "beside its step", "MB/s written", "times as fast as Flower"],
        [
            [
                name,
                f"{1e3 * seconds / updates:.1f}",
                f"{1e3 * (seconds - alone) / updates:.1f}",
                "" if name == "Flower" else f"{written / 2 / seconds:.1f}",
                f"{theirs / seconds:.2f}x",
            ]
            for name, (seconds, written) in found.items()
        ],
    )
    ratios = {f"Flower over {name}": theirs / found[name][0] for name in TRANSPORTS}
    write(given.out, ratios, {"seconds": found, "steps": alone})


if __name__ == "__main__":
    main()
