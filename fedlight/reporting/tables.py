"""A table: its printed fields, for the page, LaTeX and the terminal, and the unrounded numbers of its CSV."""

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedlight.reporting.numbers import NONE
from fedlight.runtime.files import atomic

ODD = "replace"  # for names of files that are not valid text
LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
}


class Field(NamedTuple):
    """The printed text of a field; a reader who sorts the table sorts by `value`.

    Attributes:
        best: the field is marked.
        detail: stands behind the text, smaller.
    """

    text: str
    value: float | int | str | None
    best: bool = False
    detail: str = ""


def number(value: float | None, text: Callable[[float], str]) -> Field:
    """The field of a number, which `text` prints; a dash for None."""
    return Field(NONE if value is None else text(value), value)


@dataclass(frozen=True)
class ReportTable:
    """A table, printed and raw.

    Attributes:
        name: of its files, without ending.
        numeric: the columns that are set flush right.
        rows: the printed fields, one per column.
        data: the rows of the CSV, by column.
        minor: the columns that the page hides first where the table is too wide, in that order.
        kept: the columns that the page shows even where they are the same in every row.
        is_folded: the page shows the title alone until the reader opens it.
    """

    name: str
    title: str
    note: str
    columns: list[str]
    numeric: set[str]
    rows: list[list[Field]]
    data: list[dict[str, Any]]
    minor: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()
    is_folded: bool = False

    @property
    def constant(self) -> dict[str, str]:
        """The columns whose fields are all alike, and their text: the page names them above the table."""
        if len(self.rows) < 2:
            return {}
        columns = zip(self.columns, zip(*self.rows, strict=True), strict=True)
        return {
            name: fields[0].text
            for name, fields in columns
            if name not in self.kept and len({field[:3] for field in fields}) == 1
        }

    def write(self, folder: Path) -> None:
        """Writes `name.csv` and `name.tex`."""
        columns = dict.fromkeys(column for line in self.data for column in line)
        path = folder / f"{self.name}.csv"
        with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors=ODD) as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.data)
        with atomic(folder / f"{self.name}.tex") as temporary:
            temporary.write_text(self.latex(), encoding="utf-8", errors=ODD)

    def latex(self) -> str:
        """A tabular with the rules of the package booktabs; the best of each row in bold."""
        body = [[_latex(field) for field in row] for row in self.rows]
        head, *lines = (rf"{' & '.join(row)} \\" for row in [[*map(escape, self.columns)], *body])
        alignment = "".join("r" if column in self.numeric else "l" for column in self.columns)
        ruled = (r"\toprule", head, r"\midrule", *lines, r"\bottomrule")
        tabular = [rf"\begin{{tabular}}{{{alignment}}}", *ruled, r"\end{tabular}"]
        return "\n".join([f"% {self.title}. {self.note}", *tabular, ""])


def _latex(field: Field) -> str:
    text = rf"\textbf{{{escape(field.text)}}}" if field.best else escape(field.text)
    return f"{text} {escape(field.detail)}" if field.detail else text


def escape(text: str) -> str:
    """Text with the special characters of LaTeX escaped."""
    return re.sub(".", lambda match: LATEX.get(match[0], match[0]), text)
