"""Early stopping of a cell: whether a monitored value has stopped to improve, from its rounds so far.

Lightning's EarlyStopping watches the epochs of one Trainer. The rounds of a cell outlive processes, so the
decision is a function of the stored rows alone, and a restarted cell comes to the same one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlight.config import CellConfig, EarlyStoppingConfig
from fedlight.runtime.errors import BadInput


def find_stop(config: EarlyStoppingConfig | None, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a cell ends after these rounds; None where it goes on.

    Args:
        config: section `early_stopping`, or None.
        rows: of `rounds.csv`, from the first round on; one without the monitored value is skipped.
    """
    if config is None:
        return None
    best, best_round, without = float("inf"), 0, 0
    for row in rows:
        value = row[config.monitor]
        if value is None:
            continue
        if value < best - config.min_delta:
            best, best_round, without = value, row["round"], 0
        else:
            without += 1
        if without == config.patience:
            counted = "evaluations" if config.monitor == "fid" else "rounds"
            return (
                f"{config.monitor} has not fallen by more than {config.min_delta:g} in {without} {counted}; "
                f"the best is {best:.6g} after round {best_round}"
            )
    return None


def check_early_stopping(config: CellConfig) -> None:
    """Section `early_stopping` and those of what it monitors.

    Raises:
        BadInput: the cell does not have the monitored value, or stopping by it would void a guarantee.
    """
    stopping, evaluation = config.early_stopping, config.evaluation
    if stopping is None:
        return
    needs = f"early_stopping.monitor={stopping.monitor} needs"
    if stopping.monitor == "train_loss":
        if config.privacy:
            raise BadInput(f"{needs} losses, which no client reports under privacy: set early_stopping=fid")
        return
    if not evaluation.samples or evaluation.every is None:
        raise BadInput(
            f"{needs} scores between rounds: set evaluation.every=1 or more, and evaluation.samples above 0"
        )
    if evaluation.background:
        raise BadInput(f"{needs} the scores of a round before the next one: set evaluation.background=false")
    if config.privacy and (evaluation.reference != "test" or evaluation.extractor == "classifier"):
        raise BadInput(
            f"{needs} scores that do not depend on training images under privacy: set "
            "evaluation.reference=test, and evaluation.extractor to one that is not trained on them"
        )
