"""Peak memory, disk and time against the number of clients.

python benchmarks/memory.py [--quick] [--out FILE.json]

Each cell runs in its own process on Fashion-MNIST with the paper's UNet. Ten clients take part in each of two
rounds, of ten, a hundred or a thousand.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import parser, show, write

PARTICIPANTS, ROUNDS = 10, 2


def cell(method: str, clients: int, images: int, output: str) -> dict[str, float]:
    """Peak resident MiB, seconds per local update, and private states on disk in models, of one cell."""
    command = [
        *(sys.executable, "-m", "fedlight.run", "experiment=paper", f"method={method}", f"clients={clients}"),
        *(f"fraction={PARTICIPANTS / clients}", f"data.limit={images * clients}", f"rounds={ROUNDS}"),
        *("epochs=1", "evaluation.samples=0", "evaluation.grid=0", "logger=none", "trainer.threads=1"),
        *("trainer.workers=1", f"output={output}"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    (path,) = Path(output).glob(f"*/{method}-K{clients}-*/result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    kept = sum(file.stat().st_size for file in path.parent.glob("checkpoint/clients/*/*"))
    met = len(list(path.parent.glob("checkpoint/clients/*")))
    return {
        "peak_mib": usage.ru_maxrss / 1024,
        "seconds_an_update": result["seconds"]["training"] / ROUNDS / PARTICIPANTS,
        "models_a_client": kept / met / (4 * result["model_params"]) if met else 0.0,
    }


def main() -> None:
    given = parser(__doc__).parse_args()
    methods = ("UDEC",) if given.quick else ("FULL", "USPLIT", "UDEC")
    sizes = (10, 1000) if given.quick else (10, 100, 1000)
    rows, ratios, figures = [], {}, {}
    with tempfile.TemporaryDirectory() as output:
        for method in methods:
            measured = [cell(method, clients, 16 if given.quick else 60, output) for clients in sizes]
            figures[method] = dict(zip(map(str, sizes), measured, strict=True))
            first = measured[0]
            for clients, found in zip(sizes, measured, strict=True):
                rows.append(
                    [
                        f"{method}, {clients} clients",
                        f"{found['peak_mib']:.0f} ({found['peak_mib'] / first['peak_mib']:.3f})",
                        f"{found['seconds_an_update']:.2f}"
                        f" ({found['seconds_an_update'] / first['seconds_an_update']:.2f})",
                        f"{found['models_a_client']:.2f}",
                    ]
                )
            last = measured[-1]
            ratios[f"peak memory, {method}, 10 over 1000 clients"] = first["peak_mib"] / last["peak_mib"]
            seconds = "seconds_an_update"
            ratios[f"time an update, {method}, 10 over 1000 clients"] = first[seconds] / last[seconds]
    show(
        "ten participants a round, ratio to ten clients in brackets",
        ["", "peak MiB", "seconds an update", "private state of a client, in models"],
        rows,
    )
    write(given.out, ratios, {"cells": figures})


if __name__ == "__main__":
    main()
