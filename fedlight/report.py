"""The report of sweeps: python -m fedlight.report runs/NAME [runs/OTHER ...] [--out DIR]"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from fedlight.runtime.environment import replace_unencodable
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, or with 2 where there is nothing to report on."""
    replace_unencodable()
    parser = argparse.ArgumentParser(
        prog="python -m fedlight.report",
        description="Tables, figures and one HTML page of the cells in the folders of sweeps; those that "
        "failed or are still running are shown as such.",
    )
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP", help="a sweep's folder, runs/NAME")
    parser.add_argument("--out", type=Path, help="folder of the report (default: report/ in the first sweep)")
    arguments = parser.parse_args()
    folder = arguments.out or arguments.sweeps[0] / "report"

    from fedlight.reporting.page import write_report

    try:
        cells = write_report(arguments.sweeps, folder)
    except BadInput as error:
        print(f"fedlight: error: {error}", file=sys.stderr)
        sys.exit(2)
    states = Counter(cell.state for cell in cells)
    print(f"{', '.join(f'{count} {state}' for state, count in states.items())}: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
