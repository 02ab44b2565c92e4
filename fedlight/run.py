"""Runs one cell, or with -m a sweep of them: python -m fedlight.run [-m] [KEY=VALUE ...]"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlight.data.data_name import data_name
from fedlight.evaluation.weights import weights_name
from fedlight.manual import manual
from fedlight.overrides import keep_text
from fedlight.reporting.terminal import SweepWatch
from fedlight.runs.identity import cell_folder, is_done, print_done
from fedlight.runtime.environment import load_environment, replace_unencodable
from fedlight.runtime.errors import KNOWN, BadInput, CellFailed, first_cause, raised_by_hydra
from fedlight.runtime.lease import acquire_lease
from fedlight.runtime.memory import pause_garbage_collection
from fedlight.runtime.printable import legible
from fedlight.runtime.secret import NESTED, move_to_environment, redacted
from fedlight.runtime.signals import EXIT, Interrupted

PACKAGE = Path(__file__).parent
SETTINGS = PACKAGE / "settings"  # where a wheel carries the folders configs and sweeps
ROOT = SETTINGS if SETTINGS.is_dir() else PACKAGE.parent
DEBUG = "HYDRA_FULL_ERROR"
USER_ERRORS = (*KNOWN, HydraException, OmegaConfBaseException, OSError)
"""Errors that are told in one line; others are faults of fedlight, not of its use."""


def main() -> None:
    """Exits with 0 for completed, 1 for failed in training, 2 for bad input."""
    sys.exit(command_line(check_and_run))


def command_line(work: Callable[[DictConfig], None]) -> int:
    """Composes the configuration that the command line asks for and works on it; returns the exit status."""
    replace_unencodable()
    load_environment()
    typed = sys.argv[1:]
    sys.argv[1:] = keep_text(move_to_environment(typed, os.environ))
    register_resolvers()
    sys.argv[1:] = hydra_arguments(sys.argv[1:])
    debug = DEBUG in os.environ
    os.environ[DEBUG] = "1"  # Hydra raises, and the errors are printed here
    try:
        return compose_and_run(work, typed, debug)
    finally:
        if not debug:
            del os.environ[DEBUG]


def hydra_arguments(typed: list[str]) -> list[str]:
    """The command line as Hydra takes it: flags before overrides, `--dry` as the key that it stands for."""
    keys = [a for a in typed if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    flags = [argument for argument in typed if argument not in keys and argument != "--dry"]
    return [*flags, *keys, *(["hydra.sweeper.dry=true"] if "--dry" in typed else [])]


def register_resolvers() -> None:
    """Makes known to OmegaConf what `configs/` refers to."""
    OmegaConf.register_new_resolver("fedlight.manual", lambda: manual(ROOT).replace("$", "$$"), replace=True)
    data_name.cache_clear()  # files may have changed since an earlier command of this process
    resolvers: dict[str, Callable[..., Any]] = {
        "fedlight.root": lambda: str(ROOT),
        "fedlight.home": _home,
        "fedlight.data_name": lambda kind, root, cache: data_name(kind, _home(root), _home(cache)),
        "fedlight.weights_name": lambda extractor, path: weights_name(extractor, _home(path)),
        NESTED: _decode_variable,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def _decode_variable(name: str) -> Any:
    """The list or mapping that an environment variable holds, as on Hydra's command line."""
    return OmegaConf.create({"value": f"${{oc.decode:${{oc.env:{name}}}}}"})["value"]


def _home(path: Any) -> Any:
    """A path with the home folder in place of `~`; other than text is left for the schema to refuse."""
    return os.path.expanduser(path) if isinstance(path, str) else path


def compose_and_run(work: Callable[[DictConfig], None], typed: list[str], debug: bool) -> int:
    """Hands the command line to Hydra; returns the exit status, or raises what it means in debugging."""
    status = 0

    def task(config: DictConfig) -> None:
        nonlocal status
        replace_unencodable()  # in a process of a launcher
        try:
            work(config)
        except USER_ERRORS as error:
            if debug:
                raise
            status = print_error(error)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise CellFailed(status) from None
        except Exception as error:
            if debug or HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
            print(redacted(traceback.format_exc()), file=sys.stderr)
            raise CellFailed(1) from error

    try:
        refuse_bytes(typed)
        hydra.main(config_path=str(ROOT / "configs"), config_name="config", version_base="1.3")(task)()
    except CellFailed as failed:
        status = failed.status
    except (Interrupted, KeyboardInterrupt) as interrupted:
        status = getattr(interrupted, "status", EXIT + signal.SIGINT)
        print("fedlight: interrupted; the same command goes on from here", file=sys.stderr)
    except (BadInput, HydraException, OmegaConfBaseException) as error:
        if debug:
            raise
        status = print_error(error)
    except OSError as error:
        if debug:
            raise
        status = print_error(BadInput(f"output: cannot make the folder of the sweep: {error}"))
    except Exception as error:
        if debug or not raised_by_hydra(error):
            raise
        status = print_error(error)
    finally:
        _end_workers()
        SweepWatch.close()
    return status


def check_and_run(composed: DictConfig) -> None:
    """Runs the cell; the configuration is checked before the heavy libraries are loaded."""
    from fedlight.config import validate

    command = DictConfig(HydraConfig.get())
    refuse_grid(command)
    config = validate(composed)
    if OmegaConf.select(command, "sweeper.dry"):
        from fedlight.experiment.plan_table import print_plan

        print_plan([config])
        return
    folder = cell_folder(config)
    if is_done(folder):
        print_done(folder)
        return
    with acquire_lease(folder) as lease:
        with pause_garbage_collection():
            from fedlight.experiment.cell import run_cell

        run_cell(config, lease)


def refuse_bytes(typed: list[str]) -> None:
    """Raises BadInput where an argument is not UTF-8, which Hydra cannot read."""
    for argument in typed:
        if (readable := legible(argument)) != argument:
            raise BadInput(
                f"{readable} is not UTF-8: rename that file or folder, or type a link to it (ln -s)"
            )


def refuse_grid(asked: DictConfig) -> None:
    """Raises BadInput where one cell is asked for and the configuration names a grid of several."""
    chosen = {override.lstrip("+").partition("=")[0] for override in asked.overrides.task}
    open_keys = [key for key in OmegaConf.select(asked, "sweeper.params") or () if key not in chosen]
    if asked.mode == RunMode.RUN and open_keys:
        grid = f"sweeps={asked.runtime.choices.get('sweeps') or '...'}"
        raise BadInput(
            f"{grid} is a grid of several cells: add -m to run them all, or choose one by "
            f"{' '.join(f'{key}=...' for key in open_keys)}"
        )


def _end_workers() -> None:
    """Ends the processes that trained clients, if there were any; loads nothing."""
    if processes := sys.modules.get("fedlight.federation.transport.processes"):
        processes.end_workers()


def print_error(error: Exception) -> int:
    """Prints an error as one line on stderr; returns the exit status that it means."""
    from fedlight.config import describe

    print(f"fedlight: error: {describe(error)}", file=sys.stderr)
    cause = first_cause(error)
    bad_input = isinstance(cause, BadInput | HydraException | OmegaConfBaseException)
    return 1 if isinstance(cause, USER_ERRORS) and not bad_input else 2


if __name__ == "__main__":
    main()
