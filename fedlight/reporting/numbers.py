"""How numbers are printed, the same in the page, in LaTeX and in the terminal."""

from typing import Any

NONE = "–"


def score(value: float, std: float | None = None) -> str:
    """A score with one, two or four decimals by its size, such as `3.42`, or `47.90 ± 1.20`."""
    digits = _digits(value)
    spread = "" if std is None else f" ± {std:.{digits}f}"
    return f"{value:.{digits}f}{spread}"


def interval(low: float, high: float, score: float | None = None) -> str:
    """The bounds of an interval, such as `[46.70, 49.10]`, with the decimals of a score, or of its middle."""
    digits = _digits((low + high) / 2 if score is None else score)
    return f"[{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def _digits(score: float) -> int:
    return 1 if abs(score) >= 100 else 2 if abs(score) >= 1 else 4


def change(value: float, score: float) -> str:
    """The change of a score, with its sign and the score's decimals, such as `+1.35`."""
    return f"{value:+.{_digits(score)}f}".replace("-", "−")


def percent(value: float) -> str:
    """A relative change, such as `+9 %`, with a decimal below 10 %."""
    return f"{100 * value:+.{0 if abs(value) >= 0.0995 else 1}f} %".replace("-", "−")


def share(value: float) -> str:
    """A share, 0..1, three decimals."""
    return f"{value:.3f}"


def loss(value: float) -> str:
    """A training loss, four decimals."""
    return f"{value:.4f}"


def count(value: float) -> str:
    """A whole number, in groups of three digits."""
    return f"{round(value):,}"


def data_volume(value: float) -> str:
    """Bytes in decimal units, such as `6.8 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def saved(share: float) -> str:
    """The share saved against FULL, 0..1, as a signed percentage, such as `−25.0 %`."""
    return f"{-share:+.1%}".replace("-", "−").replace("%", " %") if share else NONE


def seconds(value: float) -> str:
    """A duration in seconds, minutes or hours."""
    if value < 600:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 36000 else f"{value / 3600:.1f} h"


def plain(value: Any) -> str:
    """A value of the configuration, as it is typed on the command line, or `none`."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def rank(value: Any) -> tuple[bool, float, str]:
    """Sorts values of the configuration: numbers by size, before all others by their text."""
    number = isinstance(value, int | float)
    return not number, value if number else 0.0, str(value)
