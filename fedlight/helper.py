"""What a helping process keeps of a cell: data, model, and a federator for one client at a time."""

import ctypes
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from fedlight.config import validate
from fedlight.experiment.build import build
from fedlight.federation.cohort import Task
from fedlight.federation.federator import Federator
from fedlight.federation.store import Files, Store
from fedlight.runtime.signals import Interrupted


class Helper:
    """Does local updates of a cell for the process that runs it.

    Args:
        folder: of the cell.
        config: its configuration, resolved.
        stop: set where the cell is to end; looked at after each step.
    """

    def __init__(self, folder: Path, config: dict[str, Any], stop: ctypes.c_bool) -> None:
        unscored = OmegaConf.merge(config, {"evaluation": {"samples": 0}})
        assert isinstance(unscored, DictConfig)
        settings = validate(unscored)
        parts = build(unscored, settings)
        self.folder = folder
        self._stop = stop
        self._store = Store(folder / "checkpoint", folder.name)
        self._federator = Federator(parts.method, parts.slices, parts.module, self._store)
        self._first = self._federator.state
        self._round: Path | None = None
        halt = LambdaCallback(on_train_batch_end=lambda *_: self._check())
        self._train = parts.updater(self._federator, settings, [halt])

    def update(self, task: Task, files: Files) -> Files | None:
        """Does a task; returns where everything is then, or None where it was stopped."""
        self._store.adopt(task.client, files)
        if files.federator != self._round:
            self._federator.state = self._store.global_state() if files.federator else self._first
            self._round = files.federator
        try:
            self._train(task)
        except Interrupted:
            return None
        return replace(self._store.files(task.client), seconds=self._store.take_seconds())

    def _check(self) -> None:
        if self._stop.value:
            raise Interrupted(signal.SIGTERM)
