"""Checks a cell before it runs: its parts are made once, and nothing is written or trained."""

from functools import lru_cache

from fedlight.config import CellConfig
from fedlight.data.data_config import DataConfig
from fedlight.data.dataset import Dataset
from fedlight.data.loading import load, print_notes
from fedlight.evaluation.factory import check_evaluation
from fedlight.experiment.parts import CellParts
from fedlight.experiment.setup import assemble
from fedlight.runtime.errors import BadInput


def check(config: CellConfig, elsewhere: bool) -> CellParts | None:
    """Assembles a cell as a trial, without its evaluator: nothing is written or trained.

    Args:
        config: of the cell.
        elsewhere: the cell will run on another machine, which may have data and devices that this one lacks.

    Returns:
        The parts; None where the data are not on this machine.

    Raises:
        BadInput: as `set_up` does.
    """
    try:
        complete = _load_once(config.data.model_dump_json(), print_notes_too=elsewhere)
    except BadInput:
        if elsewhere:
            return None
        raise
    parts = assemble(config, complete, accelerator="cpu" if elsewhere else None)
    if config.evaluation.samples:
        check_evaluation(config.evaluation, parts.dataset)
    return parts


@lru_cache(maxsize=1)
def _load_once(section: str, print_notes_too: bool) -> Dataset:
    """The data set of the section `data`, as JSON; the cells of a grid often have the same one."""
    complete = load(DataConfig.model_validate_json(section))
    if print_notes_too:  # a cell on another machine prints its notes there
        print_notes(complete)
    return complete
