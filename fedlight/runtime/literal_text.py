"""Text in pictures is drawn literally: $, _, ^ and backslashes in names are no markup, no glyph is a box."""

from functools import cache
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.text import Text

BROAD_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAGothic", "NanumGothic", "Unifont"),
    *("Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "MS Gothic", "Malgun Gothic"),
)
"""Fonts with glyphs that matplotlib's own lacks, such as those of Chinese; the installed ones are used."""

FAMILY = [
    "sans-serif",
    *(name for name in BROAD_FONTS if name in {font.name for font in fontManager.ttflist}),
]
LITERAL: dict[Any, Any] = {"text.parse_math": False, "font.family": FAMILY}

literal_text = rc_context(LITERAL)
"""Decorates a function that makes a figure and draws it."""


def escape_missing_glyphs(figure: Figure) -> None:
    """Replaces the characters of a figure's texts that no font can draw by their code points."""
    for axis in (side for axes in figure.axes for side in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if labels != (drawn := [_escape(label) for label in labels]):
            axis.set_ticks(axis.get_ticklocs(), drawn)  # the text of a label is set anew at every drawing
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text.get_text() != (escaped := _escape(text.get_text())):
            text.set_text(escaped)


def _escape(text: str) -> str:
    return "".join(c if c.isspace() or ord(c) in _glyphs() else _code(c) for c in text)


@cache
def _glyphs() -> frozenset[int]:
    """The code points that the fonts of FAMILY can draw."""
    paths = [fontManager.findfont(FontProperties(family=[family])) for family in FAMILY]
    return frozenset(code for path in paths for code in get_font(path).get_charmap())


def _code(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode()
