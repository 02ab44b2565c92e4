"""TensorBoard: one run a cell, in `tensorboard/` in the cell's folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from fedlight.loggers.run_setting import with_setting

FOLDER = "tensorboard"


class CellTensorBoard(TensorBoardLogger):
    """Lightning's logger with pictures and the result, by the names that `WandbLogger` has for them."""

    def log_image(self, key: str, images: Sequence[str], step: int) -> None:
        """Logs PNG files."""
        for path in images:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self.experiment.add_image(key, pixels, step, dataformats="HWC")

    def log_result(self, result: dict[str, Any]) -> None:
        """Logs `result.json` as text."""
        content = json.dumps(result, indent=2)
        self.experiment.add_text("result", f"```json\n{content}\n```", result["rounds"])


def tensorboard_logger(folder: Path, sweep: str, cell: str, parameters: dict[str, Any]) -> CellTensorBoard:
    """Writes event files; `tensorboard --logdir runs/NAME` shows all cells of a sweep.

    The files of a stopped process are removed: its rounds are logged again, as a restarted cell does.
    """
    logger = CellTensorBoard(folder, name="", version=FOLDER)
    for events in Path(logger.log_dir).glob("events.out.tfevents.*"):
        events.unlink()
    logger.log_hyperparams(with_setting(parameters))
    return logger
