"""What all commands share: errors as one line on stderr, and the exit status that they mean."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from fedlight.runtime.environment import replace_unencodable
from fedlight.runtime.errors import KNOWN, BadInput, LeaseTaken, first_cause
from fedlight.runtime.files import explain
from fedlight.runtime.printable import legible, plain_line
from fedlight.runtime.secret import redacted

DEBUG = "HYDRA_FULL_ERROR"  # the environment variable that shows the tracebacks of errors
INTERRUPTED = 130  # the exit status after Ctrl-C


def run_command(parser: argparse.ArgumentParser, command: Callable[..., int | None]) -> int:
    """Parses the command line and runs a command, which imports heavy libraries only then.

    Args:
        parser: of the command's arguments.
        command: called with the arguments by name; it returns an exit status, or None for 0.

    Returns:
        The exit status: that of the command, or 1 where training, stored files or a guarantee fail, 2 for bad
        input and for a file that cannot be read or written.
    """
    replace_unencodable()
    arguments = parser.parse_args()
    try:
        return command(**vars(arguments)) or 0
    except OSError as error:
        print_error(error)
        return 2
    except KNOWN as error:
        return print_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def cell_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command on a finished cell: the cell's folder, `--client` and `--trust`.

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


def print_error(error: BaseException) -> int:
    """Prints an error as one line on stderr; returns the exit status that it means for a cell.

    That is 1 where training or a file failed, 2 for bad input.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    print(f"fedlight: error: {describe_error(error)}", file=sys.stderr)
    cause = first_cause(error)
    if isinstance(cause, BadInput | HydraException | OmegaConfBaseException):
        return 2
    return 1 if isinstance(cause, (*KNOWN, OSError)) else 2


def describe_error(error: BaseException) -> str:
    """An error as one line, without secrets; for a misspelled key, with the key that was probably meant."""
    cause = first_cause(error)
    message = explain(cause) if isinstance(cause, OSError) and type(cause) is not LeaseTaken else str(cause)
    line = plain_line(legible(message.split("Config search path")[0]))
    line = redacted(line) or type(cause).__name__
    if unknown := re.search(r"is not in struct full_key: (\S+)", line):
        from fedlight.config import SCHEMA_KEYS
        from fedlight.config_errors import describe_unknown

        return describe_unknown(unknown[1], SCHEMA_KEYS)
    return line
