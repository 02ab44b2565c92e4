"""The report of sweeps: python -m fedlight.report runs/NAME [runs/OTHER ...] [--out DIR] [--open]"""

import argparse
import sys
import webbrowser
from collections import Counter
from pathlib import Path

from fedlight.command import run_command


def main() -> None:
    """Exits with 0, or with 2 where there is nothing to report on."""
    parser = argparse.ArgumentParser(
        prog="python -m fedlight.report",
        description="Tables, figures and one HTML page of the cells in the folders of sweeps; those that "
        "failed or are still running are shown as such.",
    )
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP", help="a sweep's folder, runs/NAME")
    parser.add_argument("--out", type=Path, help="folder of the report (default: report/ in the first sweep)")
    parser.add_argument("--open", dest="show", action="store_true", help="open the page in a browser")
    sys.exit(run_command(parser, report))


def report(sweeps: list[Path], out: Path | None, show: bool) -> None:
    """Writes the report and prints where it is.

    Args:
        sweeps: their folders.
        out: folder of the report, or None for `report` in the first sweep.
        show: whether to open the page in the user's browser.

    Raises:
        BadInput: there is no cell to report on, or the folder cannot be written.
    """
    from fedlight.reporting.page import write_report

    folder = out or sweeps[0] / "report"
    states = Counter(cell.state for cell in write_report(sweeps, folder))
    page = folder / "index.html"
    if show and not webbrowser.open(page.resolve().as_uri()):
        print("fedlight: no browser to open the page with", file=sys.stderr)
    print(f"{', '.join(f'{count} {state}' for state, count in states.items())}: {page}")


if __name__ == "__main__":
    main()
