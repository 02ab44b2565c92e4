"""Runs the quick benchmarks, against the committed figures: python benchmarks/bench.py [--commit]

Only ratios are compared, since machines differ; greater is better. A ratio that fell by more than a quarter
is a regression, and the exit status is 1. `--commit` writes the figures instead.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import show

HERE = Path(__file__).parent
COMMITTED = HERE / "quick.json"
BENCHMARKS = ("step", "round", "sampling", "startup", "checkpoint", "memory")
TOLERANCE = 0.25


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--commit", action="store_true", help="write the figures to quick.json")
    given = arguments.parse_args()

    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in BENCHMARKS:
            out = Path(folder) / f"{name}.json"
            command = [sys.executable, str(HERE / f"{name}.py"), "--quick", "--out", str(out)]
            subprocess.run(command, check=True)
            found = json.loads(out.read_text(encoding="utf-8"))
            ratios |= found["ratios"]
    if given.commit:
        COMMITTED.write_text(
            json.dumps({"machine": found["machine"], "ratios": ratios}, indent=2) + "\n", encoding="utf-8"
        )
        return

    before = json.loads(COMMITTED.read_text(encoding="utf-8"))["ratios"]
    lost = {name for name, was in before.items() if ratios.get(name, 0.0) < (1 - TOLERANCE) * was}
    show(
        "ratios, greater is better",
        ["", "now", "committed", ""],
        [
            [
                name,
                f"{ratios[name]:.2f}" if name in ratios else "missing",
                f"{before[name]:.2f}" if name in before else "new",
                "regressed" if name in lost else "",
            ]
            for name in {**before, **ratios}
        ],
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
