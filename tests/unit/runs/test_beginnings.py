"""Which cells go on from which: by their configurations, the files of completed ones, and versions."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedlight.runs.beginnings import explain_dependence, find_beginning, find_shorter, order_by_rounds
from fedlight.runs.identity import cell_id, write_config

HERE = {"versions": {"torch": "2"}, "machine": {"processor": "p", "precision": "32-true", "cores": 2}}


def config(rounds: int, **changes: Any) -> dict[str, Any]:
    names = {key: {"name": key} for key in ("method", "data", "partition", "model")}
    plain = {"clients": 2, "epochs": 1, "seed": 1, "trainer": {"threads": 1}, "rounds": rounds}
    return names | plain | {"optimizer": {"lr": 0.1}} | changes


def flat(rounds: int, **changes: Any) -> dict[str, Any]:
    return {"seed": 1, "rounds": rounds, **changes}


def complete(sweep: Path, plain: dict[str, Any], **result: Any) -> Path:
    cell = sweep / cell_id(plain)
    cell.mkdir()
    write_config(cell / "config.yaml", plain)
    (cell / "result.json").write_text(json.dumps({"status": "completed", **HERE, **result}))
    return cell


def test_cells_that_differ_in_rounds_alone_are_run_one_after_the_other() -> None:
    cells = {
        "long": flat(9),
        "other": flat(9, seed=2),
        "short": flat(2),
        "middle": flat(5, **{"trainer.workers": 3, "logger.project": "p"}),  # keys that change no result
        "none": flat(0),
        "cosine": flat(9, **{"optimizer.decay": "cosine"}),
        "short cosine": flat(2, **{"optimizer.decay": "cosine"}),
    }
    assert order_by_rounds(cells) == [
        ["other", "short", "none", "cosine", "short cosine"],
        ["middle"],
        ["long"],
    ]
    assert {name: rounds for name, rounds in find_shorter(cells).items() if rounds} == {
        "long": [2, 5],
        "middle": [2],
    }


@pytest.mark.parametrize(
    ("key", "value", "depends"),
    [
        ("optimizer.decay", "cosine", True),
        ("optimizer.decay", None, False),
        ("optimizer.warmup", 3, False),
        ("privacy.target_epsilon", 8.0, True),
        ("privacy.noise", 1.0, False),
        ("privacy.secure_noise", True, True),
        ("privacy.secure_noise", False, False),
    ],
)
def test_what_of_a_configuration_depends_on_the_number_of_rounds(key: str, value: Any, depends: bool) -> None:
    assert (key in str(explain_dependence({key: value}))) == depends


def test_the_longest_completed_cell_with_the_same_bits_is_the_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest, folder = complete(tmp_path, config(4)), tmp_path / cell_id(config(9))
    complete(tmp_path, config(2))
    complete(tmp_path, config(8), status="failed")
    complete(tmp_path, config(7, seed=2))
    complete(tmp_path, config(9))
    complete(tmp_path, config(12))
    assert find_beginning(folder, config(9), HERE) == longest
    assert capsys.readouterr().err == ""

    complete(tmp_path, config(6), versions={"torch": "1"})
    complete(tmp_path, config(5), machine=HERE["machine"] | {"processor": "q"})
    (complete(tmp_path, config(3)) / "config.yaml").write_text("!!binary x")
    assert find_beginning(folder, config(9), HERE) == longest
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == [
        "it was trained with torch 1, and here it is 2",
        "it was trained with processor q, and here it is p",
    ]
    (longest / "config.yaml").write_text(json.dumps(config(4, seed=3)))  # the id is that of another seed
    assert find_beginning(folder, config(9), HERE) == tmp_path / cell_id(config(2))
    assert f"{longest.name} does not start it: seed is 3 there and 1 here" in capsys.readouterr().err


def test_the_number_of_cores_counts_where_a_client_uses_all_of_them(tmp_path: Path) -> None:
    for threads, expected in ((1, True), (None, False)):
        plain = config(2, trainer={"threads": threads})
        complete(tmp_path, plain, machine=HERE["machine"] | {"cores": 64})
        longer = plain | {"rounds": 3}
        assert (find_beginning(tmp_path / cell_id(longer), longer, HERE) is not None) == expected
