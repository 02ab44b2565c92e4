from fedlight.api import load as load
from fedlight.api import run as run
from fedlight.experiment.finished import open_cell as open_cell
from fedlight.reporting.cell_result import CellResult as CellResult
from fedlight.runtime.errors import FedlightError as FedlightError

__version__: str
