"""A table: what is printed, on the page and in LaTeX, and the unrounded numbers of its CSV."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fedlight.runtime.files import atomic

LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
}


class Field(NamedTuple):
    """What a table prints in one place; `value` is what it is sorted by."""

    text: str
    value: float | int | str | None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table, printed and raw.

    Attributes:
        name: of its files, without ending.
        numeric: the columns that are set flush right.
        rows: what is printed, a field a column.
        data: what the CSV holds, by column.
    """

    name: str
    title: str
    note: str
    columns: list[str]
    numeric: set[str]
    rows: list[list[Field]]
    data: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Writes `name.csv` and `name.tex`."""
        with atomic(folder / f"{self.name}.csv") as temporary:
            pd.DataFrame(self.data, dtype=object).to_csv(temporary, index=False)
        with atomic(folder / f"{self.name}.tex") as temporary:
            temporary.write_text(self.latex())

    def latex(self) -> str:
        """A tabular with the rules of the package booktabs; the best of each row in bold."""
        printed = [
            [rf"\textbf{{{escape(f.text)}}}" if f.best else escape(f.text) for f in row] for row in self.rows
        ]
        frame = pd.DataFrame(printed, columns=[escape(column) for column in self.columns])
        alignment = "".join("r" if column in self.numeric else "l" for column in self.columns)
        tabular = frame.to_latex(index=False, escape=False, column_format=alignment)
        return f"% {self.title}. {self.note}\n{tabular}"


def escape(text: str) -> str:
    """Text with the characters that LaTeX reads otherwise written out."""
    return re.sub(".", lambda match: LATEX.get(match[0], match[0]), text)
