"""Names in pictures are drawn as they are written: $, _, ^ and backslashes are no markup."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.mathtext import MathTextParser
from plausible import write_cell

from fedlight.loggers import pictures
from fedlight.reporting import figures, gallery
from fedlight.reporting.comparison import make_comparisons
from fedlight.runs.status import read_sweep

NAMES = (r"US$_1_to_US$_5", "$$", r"$\alpha^2$", r"\$x_1\$", "a^b_c", "%", "{x", "_legend", "#&~")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are drawn; mathematics is an error."""
    texts: list[str] = []
    draw = RendererAgg.draw_text

    def noted(
        self: RendererAgg, gc: object, x: float, y: float, s: str, *rest: object, **more: object
    ) -> None:
        texts.append(s)
        draw(self, gc, x, y, s, *rest, **more)

    def refuse(self: MathTextParser, s: str, *_: object, **__: object) -> None:
        raise AssertionError(f"{s} is drawn as mathematics")

    monkeypatch.setattr(RendererAgg, "draw_text", noted)
    monkeypatch.setattr(MathTextParser, "parse", refuse)
    return texts


COUNTS = np.ones((2, len(NAMES)), int)
IMAGES = torch.zeros(len(NAMES), 1, 4, 4, dtype=torch.uint8)
PICTURES: dict[str, Callable[[Path], None]] = {
    "partition": lambda path: pictures.partition_heatmap(path, np.ones((2, len(NAMES)), int), NAMES),
    "grid": lambda path: pictures.sample_grid(path, [(NAMES[1], IMAGES)], NAMES[0], NAMES),
    "histogram": lambda path: pictures.memorisation_histogram(path, np.ones(9), np.ones(9), NAMES[0]),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_names_in_the_pictures_of_a_cell_are_drawn_as_written(
    tmp_path: Path, drawn: list[str], kind: str
) -> None:
    PICTURES[kind](tmp_path / "picture.png")
    assert set(NAMES[:1] if kind == "histogram" else NAMES) <= set(drawn)


@pytest.mark.filterwarnings("error:Glyph")
def test_a_character_that_no_font_can_draw_is_its_code(tmp_path: Path, drawn: list[str]) -> None:
    names = ["\u732b", "cat \U0010fffd", "\u0e41\u0e21\u0e27", "\u00e9"]
    pictures.partition_heatmap(tmp_path / "picture.png", np.ones((2, 4), int), names)
    assert r"cat \U0010fffd" in drawn  # a private character
    assert "\u00e9" in drawn
    assert not {"\u732b", r"\u732b"}.isdisjoint(drawn)  # the font of the machine decides


def test_names_in_the_figures_of_a_report_are_drawn_as_written(tmp_path: Path, drawn: list[str]) -> None:
    sweep = tmp_path / "runs" / "made"
    for method, clients in ((r"M$_1$", 2), (r"$\x", 2)):
        cell = write_cell(sweep, method, clients, partition="$p_1$", data="US$_1$", rounds=4)
        with (cell / "partition.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("client", "label", "count"))
            table.writerows((client, name, 5) for client in range(2) for name in NAMES[:4])
        attack = {"sees": "update: decoder", "attack": "loss", "auc": [0.5, 0.4, 0.6], "epsilon_lower": 0.1}
        attack |= {"tpr_at_0.01": [0.1, 0, 0.2], "tpr_at_0.001": [0.1, 0, 0.2]}
        attack["roc"] = [[0, 0], [0.01, 0.1], [1, 1]]
        (cell / "audit.json").write_text(json.dumps({"attacks": [attack]}))
    (comparison,) = make_comparisons(read_sweep(sweep))
    made = {
        plot.name: [plot.svg(panel) for panel in plot.panels] for plot in figures.make_plots(comparison, "")
    }
    assert made.keys() >= {"roc", "partitions", "quality_exchange"}
    assert ">US$_1_to_US$_5<" in made["partitions"][0]
    assert ">0.01<" in made["roc"][0]  # where a logarithmic axis would be labelled in mathematics
    gallery.write_sheet(comparison, comparison.places[0], tmp_path / "sheet.png")
    assert {text.partition(",")[0] for text in drawn} >= {r"M$_1$", r"$\x"}
