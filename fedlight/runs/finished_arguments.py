"""Arguments and error messages of the commands on a finished cell."""

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
        verb: name of the command, such as `sample`.
        description: for the command's help.
    """
    parser = argparse.ArgumentParser(prog=f"python -m fedlight.{verb}", description=description)
    parser.add_argument("cell", type=Path, help="the cell's folder, runs/NAME/CELL")
    parser.add_argument("--client", type=int, help="use this client's model, not the federated one")
    parser.add_argument(
        "--trust", action="store_true", help="run any code that the cell's configuration names"
    )
    return parser


@contextmanager
def refusing() -> Iterator[None]:
    """Ends the process with one line on stderr if the block fails.

    The exit status is 2 for bad input and system errors, 1 for predictions that are not finite.
    """
    replace_unencodable()
    try:
        yield
    except (BadInput, Diverged, OSError) as error:
        print(f"fedlight: error: {plain_line(str(error))}", file=sys.stderr)
        sys.exit(1 if isinstance(error, Diverged) else 2)
