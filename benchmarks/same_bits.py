"""Compares the bits of this version with those of an earlier one: both run the same cells on this machine.

python benchmarks/same_bits.py [--base COMMIT] [--quick] [--out FILE.json]

The earlier version is checked out into a scratch folder. Compared are the id of the cell, `state_sha256`,
`client_sha256`, `ledger.csv`, `rounds.csv` without its seconds, and the scores. Any difference: status 1.
"""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, parser, show, write

BASE = "ff9f0c8"
SMALL = (
    "data.limit=120",
    "rounds=2",
    "epochs=1",
    "evaluation.steps=2",
    "evaluation.samples=100",
    "logger=none",
)
ALONE = ("trainer.workers=1",)
PAPER = ("experiment=paper", "data.limit=256", "clients=1", "rounds=1", "epochs=1", "trainer.threads=1")
CELLS: list[tuple[str, ...]] = [
    *((f"method={name}", "clients=3", *ALONE) for name in ("USPLIT", "UDEC", "ULATDEC", "LOCAL", "CENTRAL")),
    ("method=FULL", "clients=3", *ALONE),
    ("method=USPLIT", "clients=5", "rounds=3", *ALONE),
    ("method=UDEC", "clients=6", "rounds=4", "fraction=0.5", "federation.dropout=0.3", *ALONE),
    ("method=USPLIT", "clients=6", "rounds=4", "fraction=0.5", "federation.dropout=0.3", *ALONE),
    ("method=ULATDEC", "clients=3", "model.ema_decay=0.9", "model.exchange_ema=true", *ALONE),
    ("method=FULL", "clients=3", "model.ema_decay=0.9", "model.exchange_ema=true", *ALONE),
    ("method=UDEC", "clients=4", "trainer.workers=2"),
    ("method=FULL", "clients=4", "trainer.workers=2"),
    *(
        (f"algorithm={name}", "method=USPLIT", "clients=3", "partition=quantity_skew", *ALONE)
        for name in ("fedprox", "fedavgm", "fedadam", "scaffold", "localadam")
    ),
    ("transform=best", "method=UDEC", "clients=3", "rounds=3", *ALONE),
    ("method=UDEC_WARM", "++method.warm_start=1", "model.conditional=true", "clients=3", *ALONE),
    ("method=ULATDEC_WARM", "++method.warm_start=1", "clients=3", *ALONE),
    ("method=UDEC", "clients=3", "transport=dask", "transport.workers=1"),
    ("model.conditional=true", "method=FULL", "clients=3", "evaluation.guidance=3", *ALONE),
    ("privacy=client", "privacy.noise=1.0", "clients=6", "fraction=0.5", *ALONE),
    ("privacy=example", "privacy.noise=1.0", "clients=2", "data.batch_size=32", *ALONE),
    (*PAPER, "evaluation.samples=0", "evaluation.grid=0", *ALONE),
]


def check_out(commit: str, folder: Path) -> Path:
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def outcome(source: Path, arguments: tuple[str, ...], output: Path) -> dict[str, Any]:
    """Runs a cell by the given version; returns the values that must be equal."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "fedlight.run", *SMALL, *arguments, f"output={output}"]
    done = subprocess.run(
        command,
        cwd=output,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        sys.exit(f"{source}: {' '.join(arguments)}\n{done.stderr}")
    (path,) = output.glob("*/*/result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    compared = {key: result[key] for key in ("cell", "state_sha256", "client_sha256", "exchange", "fid")}
    for name in ("ledger.csv", "rounds.csv"):
        with (path.parent / name).open(newline="", encoding="utf-8") as file:
            compared[name] = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    return compared


def common_part(now: Any, earlier: Any) -> Any:
    """The entries and columns of this version that the earlier one has as well."""
    if isinstance(now, dict) and isinstance(earlier, dict):
        return {key: common_part(value, earlier[key]) for key, value in now.items() if key in earlier}
    if isinstance(now, list) and isinstance(earlier, list) and len(now) == len(earlier):
        return [common_part(*pair) for pair in zip(now, earlier, strict=True)]
    return now


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--base", default=BASE, help="the earlier version (default: %(default)s)")
    given = arguments.parse_args()
    rows, equal = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        before = check_out(given.base, Path(scratch, "before"))
        for number, cell in enumerate(CELLS[:3] if given.quick else CELLS):
            outcomes = []
            for version, source in (("before", before), ("now", ROOT)):
                output = Path(scratch, f"{version}{number}")
                output.mkdir()
                outcomes.append(outcome(source, cell, output))
            earlier, now = outcomes
            differing = [key for key in earlier if earlier[key] != common_part(now[key], earlier[key])]
            equal[" ".join(cell)] = not differing
            rows.append([" ".join(cell), str(earlier["state_sha256"])[:12], ", ".join(differing) or "equal"])
            print(*rows[-1], flush=True)
    show(f"{given.base} against this version", ["cell", "state_sha256", "differs in"], rows)
    write(given.out, {}, {"base": given.base, "equal": equal})
    sys.exit(0 if all(equal.values()) else 1)


if __name__ == "__main__":
    main()
