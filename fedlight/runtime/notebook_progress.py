"""Progress bars in the output of a notebook's cell."""

import time
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID

INTERVAL = 0.2  # seconds between two pictures of bars that advance
WIDTH = 14  # of a bar, in characters: with the cell's name the line fits beside a file browser


class NotebookProgress(Progress):
    """Bars of rich as one output of a notebook's cell, which is replaced while they move, and then empty.

    `update` shows the bars at once, `advance` and `refresh` at most once in INTERVAL seconds. rich itself
    shows bars in a notebook by ipywidgets, which many kernels do not have.

    Args:
        columns: of each bar.
    """

    def __init__(self, *columns: str | ProgressColumn) -> None:
        self._output: Any = None
        self._shown_at = 0.0
        super().__init__(*columns, auto_refresh=False)
        for column in self.columns:
            if isinstance(column, BarColumn):
                column.bar_width = WIDTH

    def start(self) -> None:
        from IPython.display import display

        self._output = display(self.make_tasks_table(self.tasks), display_id=True)

    def stop(self) -> None:
        from IPython.display import HTML

        self._output.update(HTML(""))
        self._output = None

    def refresh(self) -> None:
        if time.monotonic() - self._shown_at > INTERVAL:
            self._show()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self.refresh()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._show()

    def _show(self) -> None:
        if self._output is not None:
            self._shown_at = time.monotonic()
            self._output.update(self.make_tasks_table(self.tasks))
