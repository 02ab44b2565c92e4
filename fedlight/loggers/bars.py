"""Progress of a cell: bars at a terminal and in a notebook, elsewhere a line every minute."""

import time
from collections.abc import Callable

from lightning import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from fedlight.runtime.progress import ProgressLines, make_progress
from fedlight.runtime.training_loss import client_losses

REFRESH = 0.5  # seconds between readings of the loss


class ProgressBars(Callback):
    """Bars for rounds, the round's clients and the client's batches, with loss and time left.

    Use as a context manager, and as a callback of every client's Trainer.
    """

    def __init__(self, label: str, rounds: int, cohort: int = 1) -> None:
        self._progress = make_progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._rounds = self._progress.add_task(label, total=rounds, note="")
        self._clients = self._progress.add_task("clients", total=None, visible=False, note="")
        self._batches = self._progress.add_task("batches", total=None, visible=False, note="")
        self._read_loss_at = 0.0
        self._cohort = cohort
        self._training = 1
        self._lines = ProgressLines(label) if self._progress.disable else None

    def __enter__(self) -> "ProgressBars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def go_on_after(self, round_: int) -> None:
        """Shows `round_` rounds as completed."""
        self._progress.update(self._rounds, completed=round_)
        self._progress.reset(self._clients, total=self._cohort, visible=True)

    def end_update(self, clients: int = 1) -> None:
        """Counts clients that have trained, in this process or in another one."""
        self._progress.update(self._clients, advance=clients)
        self._print_line()

    def end_round(self, train_loss: float | None) -> None:
        note = "" if train_loss is None else f"loss {train_loss:.4f}"
        self._progress.update(self._rounds, advance=1, note=note)
        self._progress.reset(self._clients, total=self._cohort, visible=True)

    def sampling(self, steps: int) -> Callable[[int], None]:
        """Replaces the lower bars by one of `steps` denoising steps; returns a function to advance it."""
        self._progress.update(self._clients, visible=False)
        self._progress.reset(self._batches, total=steps, description="sampling", visible=True, note="")
        lines, done = ProgressLines("sampling"), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._progress.advance(self._batches, count)
            if self._progress.disable:
                lines.update(done / steps, f"{done} of {steps} denoising steps")

        return advance

    def _print_line(self) -> None:
        """Without a terminal, prints the progress of rounds and clients if a line is due."""
        if self._lines is None:
            return
        rounds, clients, batches = self._progress.tasks
        within = (clients.completed + (batches.percentage / 100 if batches.total else 0)) / self._cohort
        share = (rounds.completed + min(within, 1)) / (rounds.total or 1)
        where = f"round {int(rounds.completed) + 1} of {rounds.total:.0f}"
        self._lines.update(share, f"{where}, {int(clients.completed)} of {self._cohort} clients")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.num_training_batches * (trainer.max_epochs or 1)
        self._progress.reset(self._batches, total=int(total), description="batches", visible=True, note="")
        self._training = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        losses = client_losses(trainer, outputs)
        self._training = max(self._training, len(losses))
        self._progress.advance(self._batches)
        self._print_line()
        if not self._progress.disable and time.monotonic() - self._read_loss_at > REFRESH:
            self._read_loss_at = time.monotonic()
            self._progress.update(self._batches, note=f"loss {losses.mean():.4f}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_update(self._training)
