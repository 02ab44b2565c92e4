"""What the commands on a finished cell have in common: their arguments, and errors in one line."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlight.runtime.environment import replace_unencodable
from fedlight.runtime.errors import BadInput, Diverged
from fedlight.runtime.printable import plain_line


def finished_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser of the cell's folder, `--client` and `--trust`.

    Args:
        verb: of the command, such as sample.
        description: of the command, for its help.
    """
    parser = argparse.ArgumentParser(prog=f"python -m fedlight.{verb}", description=description)
    parser.add_argument("cell", type=Path, help="the cell's folder, runs/NAME/CELL")
    parser.add_argument("--client", type=int, help="the client's own model; without it, the federated one")
    parser.add_argument(
        "--trust", action="store_true", help="run whatever code the cell's configuration names"
    )
    return parser


@contextmanager
def refusing() -> Iterator[None]:
    """Ends the process with one line on stderr where a command fails.

    The status is 2 for bad input and for what the system refuses, 1 for predictions that are not finite.
    """
    replace_unencodable()
    try:
        yield
    except (BadInput, Diverged, OSError) as error:
        print(f"fedlight: error: {plain_line(str(error))}", file=sys.stderr)
        sys.exit(1 if isinstance(error, Diverged) else 2)
