"""The cost of a small local update beside its steps, and of its checkpoint, in an earlier version and now.

python benchmarks/update.py [--base COMMIT] [--quick] [--out FILE.json]

100 clients of 14 digits, three rounds of one local epoch: 300 updates of a single step, in one process. The
earlier version, this one and a bare PyTorch loop of the same steps run in turns, each in its own process.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, composed, parser, show, write
from same_bits import BASE, check_out

CELL = ("clients=100", "rounds=3", "epochs=1", "evaluation.samples=0", "evaluation.grid=0", "logger=none")
UPDATES = 300
BARE = "--bare"


def run_bare() -> None:
    """Prints the seconds of the same 300 updates by a bare loop, which aggregates but stores nothing."""
    from round import bare

    from fedlight.experiment.setup import set_up

    _, config = composed(*CELL)
    parts = set_up(config)
    first = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    begun = time.perf_counter()
    bare(parts, first)
    print(time.perf_counter() - begun)


def run_cell(source: Path) -> dict[str, float]:
    """The `seconds` of the cell's result, by the given version."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "fedlight.run", *CELL, "trainer.workers=1", f"output={output}"]
        subprocess.run(command, cwd=output, env=environment, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(output).glob("*/*/result.json")
        return json.loads(path.read_text(encoding="utf-8"))["seconds"]


def main() -> None:
    if BARE in sys.argv:
        run_bare()
        return
    arguments = parser(__doc__)
    arguments.add_argument("--base", default=BASE, help="the earlier version (default: %(default)s)")
    given = arguments.parse_args()
    found: dict[str, list[dict[str, float]]] = {"before": [], "now": [], "bare": []}
    with tempfile.TemporaryDirectory() as scratch:
        before = check_out(given.base, Path(scratch))
        for _ in range(1 if given.quick else 3):
            found["before"].append(run_cell(before))
            found["now"].append(run_cell(ROOT))
            command = [sys.executable, __file__, BARE]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace"
            )
            found["bare"].append({"total": float(done.stdout.split()[-1])})

    def median(version: str, key: str) -> float:
        return statistics.median(run[key] for run in found[version])

    bare_total = median("bare", "total")
    rows = [["bare loop", f"{bare_total:.2f}", "", "", f"{1e3 * bare_total / UPDATES:.1f}", ""]]
    beside = {}
    for version in ("before", "now"):
        total, checkpoint, merging = (median(version, key) for key in ("total", "checkpoint", "merging"))
        beside[version] = 1e3 * (total - bare_total) / UPDATES
        rows.append(
            [
                version,
                f"{total:.2f}",
                f"{checkpoint:.2f} ({checkpoint / total:.1%})",
                f"{merging:.2f}",
                f"{1e3 * total / UPDATES:.1f}",
                f"{beside[version]:.1f}",
            ]
        )
    show(
        f"{UPDATES} local updates of one step, tiny UNet; {given.base} and this version",
        ["", "seconds", "of these checkpoint", "merging", "ms an update", "ms beside the bare loop"],
        rows,
    )
    write(given.out, {"update, before over now": beside["before"] / beside["now"]}, {"seconds": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
