"""The cost of checkpoints in a cell: seconds and disk.

python benchmarks/checkpoint.py [runs/NAME] [--quick] [--out FILE.json]

Reads the cells of a finished sweep; without one, a default cell of UDEC is run for it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, parser, show, write


def run_cell(output: str, quick: bool) -> Path:
    command = ["-m", "fedlight.run", "method=UDEC", "name=checkpoint", f"output={output}", "logger=none"]
    command += ["evaluation.samples=0", *(["rounds=2", "epochs=4"] if quick else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return Path(output) / "checkpoint"


def figures(path: Path) -> dict[str, float | str]:
    result = json.loads(path.read_text(encoding="utf-8"))
    files = [file for file in (path.parent / "checkpoint").rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return {
        "cell": result["cell"],
        "seconds": result["seconds"]["total"],
        "checkpoint_share": result["seconds"]["checkpoint"] / result["seconds"]["total"],
        "files": len(files),
        "mebibytes": size / 2**20,
        "models": size / (4 * result["model_params"]),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("sweep", type=Path, nargs="?")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as output:
        sweep = given.sweep or run_cell(output, given.quick)
        rows = sorted(map(figures, sweep.glob("*/result.json")), key=lambda row: row["checkpoint_share"])
    show(
        f"{sweep.name}: checkpoints",
        ["cell", "seconds", "share of the time", "files", "MiB", "in models"],
        [
            [
                row["cell"],
                f"{row['seconds']:.0f}",
                f"{row['checkpoint_share']:.2%}",
                str(row["files"]),
                f"{row['mebibytes']:.1f}",
                f"{row['models']:.1f}",
            ]
            for row in rows
        ],
    )
    write(given.out, {"time without checkpoints": 1 - rows[-1]["checkpoint_share"]}, {"cells": rows})


if __name__ == "__main__":
    main()
