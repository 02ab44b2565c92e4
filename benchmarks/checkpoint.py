"""What a restart costs beforehand: seconds and disk that checkpoints took in the cells of a finished sweep.

python benchmarks/checkpoint.py runs/demo [--out FILE.json]
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    rows = []
    for path in sorted(arguments.sweep.glob("*/result.json")):
        result = json.loads(path.read_text())
        files = [file for file in (path.parent / "checkpoint").rglob("*") if file.is_file()]
        rows.append(
            {
                "cell": result["cell"],
                "seconds": result["seconds"]["total"],
                "checkpoint_share": result["seconds"]["checkpoint"] / result["seconds"]["total"],
                "files": len(files),
                "mebibytes": sum(file.stat().st_size for file in files) / 2**20,
                "models": sum(file.stat().st_size for file in files) / (4 * result["model_params"]),
            }
        )
    rows.sort(key=lambda row: row["checkpoint_share"])

    table = Table(title=f"{arguments.sweep}: checkpoints")
    for column in ("cell", "seconds", "share of the time", "files", "MiB", "in models"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    for row in rows:
        table.add_row(
            row["cell"],
            f"{row['seconds']:.0f}",
            f"{row['checkpoint_share']:.2%}",
            str(row["files"]),
            f"{row['mebibytes']:.1f}",
            f"{row['models']:.1f}",
        )
    Console(width=110).print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
