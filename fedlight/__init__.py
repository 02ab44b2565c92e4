"""Federated training of diffusion models: single runs and sweeps over methods, clients and partitions.

In Python and notebooks:

- `fedlight.run(["method=UDEC", "clients=5"])` runs one cell and returns a `CellResult`.
- `fedlight.load("runs/demo")` reads a sweep as a table.
- `fedlight.open_cell(folder)` opens a finished cell: its images by `sample`, its models by `model`.
- `fedlight.FedlightError` is the base class of the errors that they raise.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "run": "fedlight.run",
    "load": "fedlight.api",
    "open_cell": "fedlight.experiment.finished",
    "CellResult": "fedlight.reporting.cell_result",
    "FedlightError": "fedlight.runtime.errors",
}
__all__ = ["CellResult", "FedlightError", "load", "open_cell", "run"]


def __getattr__(name: str) -> Any:
    """Imports a name of the API when it is first used, so that `import fedlight` takes no time."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fedlight' has no attribute {name!r}")
    module = import_module(_MODULES[name])
    return module if name == "run" else getattr(module, name)  # the command `fedlight.run` can be called


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
