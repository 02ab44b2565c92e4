"""Commands whose configuration Hydra composes (run, prepare): from the command line to an exit status."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedlight.command import DEBUG, print_error
from fedlight.compose import ROOT, register_resolvers
from fedlight.overrides import keep_text
from fedlight.runtime.environment import load_environment, replace_unencodable
from fedlight.runtime.errors import KNOWN, BadInput, CellFailed, LeaseTaken, raised_by_hydra
from fedlight.runtime.printable import legible
from fedlight.runtime.secret import move_to_environment, redacted
from fedlight.runtime.signals import EXIT, Interrupted

USER_ERRORS = (*KNOWN, HydraException, OmegaConfBaseException, OSError)
"""Errors that are printed as one line; others are bugs of fedlight and keep their traceback."""


def run_hydra_command(work: Callable[[DictConfig], None]) -> int:
    """Composes the configurations that the command line names and works on each; returns the exit status."""
    replace_unencodable()
    load_environment()
    typed = sys.argv[1:]
    sys.argv[1:] = keep_text(move_to_environment(typed, os.environ))
    register_resolvers()
    sys.argv[1:] = order_arguments(sys.argv[1:])
    debug = DEBUG in os.environ
    os.environ[DEBUG] = "1"  # Hydra raises, and the errors are printed here
    try:
        return _run(work, typed, debug)
    finally:
        end_workers()
        if not debug:
            del os.environ[DEBUG]


def order_arguments(typed: Sequence[str]) -> list[str]:
    """The command line in Hydra's order: flags before overrides, `--dry` as the key that it stands for."""
    keys = [a for a in typed if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    flags = [argument for argument in typed if argument not in keys and argument != "--dry"]
    return [*flags, *keys, *(["hydra.sweeper.dry=true"] if "--dry" in typed else [])]


def check_utf8(typed: Sequence[str]) -> None:
    """Raises BadInput where an argument is not UTF-8, which Hydra cannot read."""
    for argument in typed:
        if (readable := legible(argument)) != argument:
            raise BadInput(
                f"{readable} is not UTF-8: rename that file or folder, or type a link to it (ln -s)"
            )


def _run(work: Callable[[DictConfig], None], typed: Sequence[str], debug: bool) -> int:
    """Calls Hydra; returns the exit status. With `debug`, errors are raised instead of printed."""
    status = 0

    def run_cell(config: DictConfig) -> None:
        nonlocal status
        replace_unencodable()  # in a process of a launcher
        try:
            work(config)
        except USER_ERRORS as error:
            if debug:
                raise
            status = print_error(error)
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # of a single cell, Hydra would print a line more
                raise CellFailed(status) from None
        except Exception as error:
            if debug or HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
            print(redacted(traceback.format_exc()), file=sys.stderr)
            raise CellFailed(1) from error

    try:
        check_utf8(typed)
        hydra.main(config_path=str(ROOT / "configs"), config_name="config", version_base="1.3")(run_cell)()
    except CellFailed as failed:
        return failed.status
    except (Interrupted, KeyboardInterrupt) as interrupted:
        print("fedlight: interrupted; the same command goes on from here", file=sys.stderr)
        return int(getattr(interrupted, "status", EXIT + signal.SIGINT))
    except (BadInput, LeaseTaken, HydraException, OmegaConfBaseException) as error:
        if debug:
            raise
        return print_error(error)
    except OSError as error:
        if debug:
            raise
        return print_error(BadInput(f"output: cannot make the folder of the sweep: {error}"))
    except Exception as error:
        if debug or not raised_by_hydra(error):
            raise
        return print_error(error)
    return status


def end_workers() -> None:
    """Ends the processes that trained clients or evaluated models, if there are any; imports nothing."""
    if background := sys.modules.get("fedlight.experiment.background"):
        background.PROCESS_CACHE.end()
    if processes := sys.modules.get("fedlight.federation.transport.processes"):
        processes.end_workers()
