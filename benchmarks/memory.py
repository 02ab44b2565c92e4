"""Peak memory against the number of clients: python benchmarks/memory.py [--out FILE.json]

Each cell is a process of its own on Fashion-MNIST with the paper's UNet; ten clients of 60 images take part
in each of two rounds, whether they are all there are or ten of a thousand.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

IMAGES = 60  # of each client
CLIENTS = (10, 100, 1000)
METHODS = ("FULL", "UDEC")


def peak(method: str, clients: int, output: str) -> float:
    """Peak resident memory of a cell, in MiB."""
    command = [
        *(sys.executable, "-m", "fedlight.run", "experiment=paper", f"method={method}", f"clients={clients}"),
        *(f"fraction={10 / clients}", f"data.limit={IMAGES * clients}", "rounds=2", "epochs=1"),
        *("evaluation.grid=0", "logger=none", "trainer.threads=1", f"output={output}"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    out = parser.parse_args().out

    table = Table("method", *(f"{clients} clients" for clients in CLIENTS), title="peak memory, MiB (ratio)")
    figures = {}
    with tempfile.TemporaryDirectory() as output:
        for method in METHODS:
            peaks = [peak(method, clients, output) for clients in CLIENTS]
            figures[method] = dict(zip(CLIENTS, peaks, strict=True))
            table.add_row(method, *(f"{value:.0f} ({value / peaks[0]:.3f})" for value in peaks))
    Console().print(table)
    if out:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        out.write_text(json.dumps({"peak_mib": figures, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
