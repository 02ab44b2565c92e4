"""The report of a sweep, made in this process, and its page read back."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedlight import report


def run_report(*arguments: str | Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedlight.report", *map(str, arguments)])
        try:
            report.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


class Page(HTMLParser):
    """The tables of a page, by their section's id: lists of rows of text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.tables: dict[str, list[list[str]]] = {}
        self._section, self._field = "", False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self._section = dict(attrs).get("id") or ""
        elif tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        elif tag in ("th", "td"):
            self.tables[self._section][-1].append("")
            self._field = True

    def handle_endtag(self, tag: str) -> None:
        self._field &= tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._field:
            self.tables[self._section][-1][-1] += data.strip()

    def records(self, table: str) -> list[dict[str, str]]:
        head, *body = self.tables[table]
        return [dict(zip(head, row, strict=True)) for row in body]
