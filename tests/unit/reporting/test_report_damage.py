"""A cell that holds what its report cannot read costs that cell a line on the page, and not the report."""

import copy
import json
import os
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from plausible import write_cell
from report_page import Page, run_report

from fedlight.reporting.comparison import make_comparisons
from fedlight.reporting.figures import make_plots
from fedlight.reporting.gallery import Grid, build
from fedlight.reporting.summaries import by_cell, summaries
from fedlight.runs.reader import CellFiles, Result
from fedlight.runs.status import read_sweep

PRIVACY = {"kind": "example", "epsilon": 3.0, "delta": 1e-5, "noise": 1.1, "clip": 1.0, "draws": 4}
ATTACK = {
    "sees": "released model",
    "attack": "loss",
    "auc": [0.6, 0.5, 0.7],
    "tpr_at_0.01": [0.02, 0.0, 0.1],
    "tpr_at_0.001": [0.02, 0.0, 0.1],
    "epsilon_lower": 0.5,
    "roc": [[0.0, 0.1], [1.0, 1.0]],
}
DEEP = "DEEP"  # stands for nested lists, which no encoder writes
WRONG = ("text", -7, [], {}, [["x"]], {"a": None}, True, 10**30, float("inf"), float("nan"), 1e308, DEEP)


def written(content: Any) -> str:
    return json.dumps(content).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of a JSON document."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node[:1]):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def replaced(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(node)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Another whole cell, with a privacy entry and an audit; its seed is new, and so is a given partition."""
    seeds = count(1)

    def call(partition: str = "iid") -> Path:
        sweep = tmp_path / "runs" / "made"
        folder = write_cell(sweep, "UDEC", 3, seed=next(seeds), partition=partition, picture=False)
        result = json.loads((folder / "result.json").read_text())
        result |= {"privacy": PRIVACY, "machine": {"cores": 4}}
        result["fid"] |= {"label_accuracy": {"all": 0.5, "held": 0.6, "unseen": 0.4}}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "audit.json").write_text(json.dumps({"attacks": [ATTACK]}))
        return folder

    return call


def noted(page: Path) -> str:
    """The part of a page that names what is not done, and why."""
    return page.read_text().partition('id="unfinished"')[2].partition("</table>")[0]


def bombed(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


def a_text(path: Path) -> None:
    path.write_text("no picture")


@pytest.mark.parametrize("damage", [a_text, bombed, Path.mkdir])
def test_an_unreadable_picture_is_listed_with_its_cell(damage: Callable[[Path], Any], make: Any) -> None:
    cell = make()
    damage(cell / "samples" / "round_004.png")
    (read,) = read_sweep(cell.parent)
    assert Grid(read, "round_004.png", 4).read() is None
    assert read.note.startswith("samples/round_004.png cannot be read: ")


BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "an epsilon that is a text": lambda cell: edit(cell, "result.json", ("privacy", "epsilon"), "much"),
    "a privacy entry without a clip": lambda cell: edit(
        cell, "result.json", ("privacy",), {"kind": "client"}
    ),
    "a list of clients that is too long": lambda cell: edit(
        cell, "result.json", ("fid", "clients"), [*range(9)]
    ),
    "an attack without its ROC": lambda cell: edit(cell, "audit.json", ("attacks", 0), {"sees": "all"}),
    "a number of clients that is a list": lambda cell: edit_config(cell, clients=[3]),
    "a method whose name is a list": lambda cell: edit_config(cell, method={"name": ["UDEC"]}),
    "two rows for a label": lambda cell: (cell / "partition.csv").write_text(
        "client,label,count\n0,a,1\n0,a,2\n"
    ),
    "an infinite loss": lambda cell: (cell / "rounds.csv").write_text("round,train_loss\n1,inf\n"),
    "rows that are too long": lambda cell: (cell / "rounds.csv").write_text("round,train_loss\n1,2,3,4\n"),
    "a table that is no text": lambda cell: (cell / "rounds.csv").write_bytes(b"\xff\x00\n"),
    "a picture that is a text": lambda cell: a_text(cell / "samples" / "round_004.png"),
}
ODD_FILES: dict[str, Callable[[Path], Any]] = {
    "a picture of no round": lambda cell: Image.new("L", (9, 9)).save(cell / "samples" / "round_best.png"),
    "a link to nowhere": lambda cell: (cell / "away").symlink_to(cell / "nowhere"),
    "a formula in a name": lambda cell: edit_config(cell, partition={"name": "$\\frac$"}),
    "a path in a name": lambda cell: edit_config(cell, data={"name": "../" * 9 + "x" * 300}),
    "a name that is no text": lambda cell: os.rename(os.fsencode(cell), os.fsencode(cell) + b"\xff"),
    "a plan that is none": lambda cell: plan(cell.parent, cells={"../../etc": 3}),
    "a plan whose command is a number": lambda cell: plan(cell.parent, command=3, cells={}),
}


def table(cell: Path, name: str, content: bytes) -> None:
    (cell / name).write_bytes(content)


def edit(cell: Path, name: str, path: tuple[Any, ...], value: Any) -> None:
    content = json.loads((cell / name).read_text())
    (cell / name).write_text(written(replaced(content, path, value)))


def edit_config(cell: Path, **sections: Any) -> None:
    config = yaml.safe_load((cell / "config.yaml").read_text())
    (cell / "config.yaml").write_text(yaml.safe_dump(config | sections))


def plan(sweep: Path, **content: Any) -> None:
    (sweep / ".plan").mkdir(exist_ok=True)
    path = sweep / ".plan" / f"{len(list((sweep / '.plan').iterdir()))}.json"
    path.write_text(json.dumps({"command": [], "folder": "", "process": {"since": 3}, **content}))


def test_only_pictures_of_rounds_are_in_the_gallery(make: Callable[..., Path], tmp_path: Path) -> None:
    cell = make()
    names = ("round_2.png", "round_best.png", "round_0010.png", "round_.png", "round_99.jpg")
    for place, name in enumerate(names):
        Image.new("L", (9, 9), 50 * place).save(cell / "samples" / name)
    (comparison,) = make_comparisons(read_sweep(cell.parent))
    ((row,), left_out) = build(comparison, tmp_path, "", 9)
    (tile,) = row.tiles
    assert tile.title == "UDEC, round 10"
    with Image.open(BytesIO(b64decode(tile.source.partition(",")[2]))) as picture:
        assert picture.convert("L").getpixel((4, 4)) == pytest.approx(100, abs=2)
    assert left_out == 0


@pytest.mark.slow
def test_every_damaged_cell_is_named_and_the_report_is_written(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    cells = {name: make(str(number)) for number, name in enumerate(BAD_FILES)}
    odd = {name: make() for name in ODD_FILES}
    intact = make()
    for name, damage in (BAD_FILES | ODD_FILES).items():
        damage((cells | odd)[name])
    out = tmp_path / "out"
    assert run_report(intact.parent, "--out", out) == 0
    lines = noted(out / "index.html")
    for name, cell in cells.items():
        assert f"<td>made/{cell.name}</td>" in lines, name
        assert "cannot be read" in lines.partition(cell.name)[2].partition("</tr>")[0], name
    for name, cell in odd.items():
        assert cell.name not in lines, name
    assert intact.name not in lines
    assert intact.name in Page(out / "index.html").text
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}


def test_a_result_with_any_wrong_value_is_valid_or_noted_as_a_problem(
    make: Callable[..., Path],
) -> None:
    """A result that is read has the types that a report depends on; otherwise the problem is noted."""
    cell = make()
    result = json.loads((cell / "result.json").read_text())
    tried = refused = 0
    for path in places(result):
        for value in WRONG:
            (cell / "result.json").write_text(written(replaced(result, path, value)))
            files = CellFiles(cell)
            read = files.result
            assert (read is None) == ("result.json" in files.problems), (path, value)
            if read is not None:
                assert Result.model_validate(read.model_dump(), strict=True) == read
                assert abs(read.quality("value") or 0) <= 1e100
            tried, refused = tried + 1, refused + (read is None)
    assert tried > 500
    assert refused > tried / 3
    assert CellFiles(make()).result is not None


@pytest.mark.slow
def test_a_report_of_a_cell_for_every_wrong_field(make: Callable[..., Path], tmp_path: Path) -> None:
    cell = make()
    documents = {name: json.loads((cell / name).read_text()) for name in ("result.json", "audit.json")}
    for name, document in documents.items():
        for number, path in enumerate(places(document)):
            for value in WRONG[number % 3 :: 3]:
                damaged = make()
                own = json.loads((damaged / name).read_text())
                (damaged / name).write_text(written(replaced(own, path, value)))
    config = yaml.safe_load((cell / "config.yaml").read_text())
    for number, path in enumerate(places(config)):
        for value in WRONG[number % 3 : -1 : 3]:
            damaged = make()
            own = yaml.safe_load((damaged / "config.yaml").read_text())
            (damaged / "config.yaml").write_text(yaml.safe_dump(replaced(own, path, value)))
    out = tmp_path / "out"
    assert run_report(cell.parent, "--out", out) == 0
    lines = noted(out / "index.html")
    for folder in cell.parent.glob("[!.]*/"):
        files = CellFiles(folder)
        problems = [*files.check(), *(["audit"] if files.audit and "audit.json" in files.problems else [])]
        assert bool(problems) <= (folder.name in lines), (folder, problems)


def test_seeds_that_are_no_numbers_are_compared_as_text(make: Callable[..., Path]) -> None:
    cell = make()
    edit_config(cell, partition={"name": "iid", "seed": [1, 2]})
    edit_config(make(), method={"name": "FULL"}, partition={"name": "iid", "seed": {"a": [3]}})
    for comparison in make_comparisons(read_sweep(cell.parent)):
        assert [table.rows for table in summaries(comparison, "")]


def test_a_folder_whose_name_is_no_text_is_in_the_csv_of_a_figure(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    cell = make()
    os.rename(os.fsencode(cell), os.fsencode(cell) + b"\xff")
    (comparison,) = make_comparisons(read_sweep(cell.parent))
    plot = next(plot for plot in make_plots(comparison, "") if plot.name == "client_spread")
    plot.write(tmp_path)
    assert f"{cell.name}?" in (tmp_path / "client_spread.csv").read_text()


def test_a_section_that_is_a_text_shares_the_column_of_its_name(make: Callable[..., Path]) -> None:
    cell = make()
    edit_config(cell, model="text")
    edit_config(make(), model={"name": "tiny"})
    table = by_cell(read_sweep(cell.parent))
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.constant
