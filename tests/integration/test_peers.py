"""The federation that other frameworks are given (`benchmarks/peers.py`) is that of a cell."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch
from common import ROOT
from conftest import SMALL, Cell
from peer_workers import federation as federations
from peers import Measurement, Scenario, check_equal, make_federation, work_of
from safetensors.torch import load_file

WORK = ("clients=6", "fraction=0.5", "epochs=2", "seed=3")


@pytest.fixture
def run_loop(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """The reference worker, imported as a script of its folder is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peer_workers"))
    from bare_loop import main

    return main


def test_a_plain_loop_over_the_written_federation_gives_the_weights_of_the_cell(
    cell: Callable[..., Cell],
    run_loop: Callable[[str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = cell(*WORK)
    federation = make_federation([*SMALL, *WORK])
    source, out = tmp_path / "federation.safetensors", tmp_path / "weights.safetensors"
    federations.write(federation, source)
    capsys.readouterr()
    run_loop(str(source), str(out))
    printed = json.loads(capsys.readouterr().out)
    participants = [
        sorted({int(row["client"]) for row in made.rows("ledger.csv") if row["round"] == round_})
        for round_ in ("1", "2")
    ]
    assert federation.cohorts == participants
    sizes = [[made.sizes[client] for client in cohort] for cohort in participants]
    assert printed["images"] == 2 * sum(map(sum, sizes))
    assert printed["steps"] == 2 * sum(-(-size // 16) for cohort in sizes for size in cohort)
    assert printed["loss"] == pytest.approx(float(made.rows("rounds.csv")[-1]["train_loss"]), rel=1e-5)
    assert work_of(federation, participants) == (printed["steps"], printed["images"])
    for name, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, made.model[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1}, "slow took"),
        ({"loss": 0.6}, "has a loss of 0.6"),
        ({"weights": {"w": torch.ones(2)}}, "other weights than fast"),
        ({"weights": {"v": torch.zeros(2)}}, "other parameters"),
    ],
)
def test_other_work_ends_the_comparison(change: dict[str, object], message: str) -> None:
    federation = make_federation([*SMALL, *WORK])
    steps, images = work_of(federation, federation.cohorts)
    same = Measurement([1.0, 1.0], 1.0, 1.0, 1.0, 0.5, steps, images, {"w": torch.zeros(2)})
    assert check_equal({"fast": same, "slow": same}, federation, "fast") == {"fast": 0.0, "slow": 0.0}
    with pytest.raises(SystemExit, match=message):
        check_equal({"fast": same, "slow": replace(same, **change)}, federation, "fast")


def test_rounds_after_the_first_are_compared_and_what_is_skipped_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def systems(federation: federations.Federation, path: Path, settings: list[str]) -> object:
        work = work_of(federation, federation.cohorts)

        def measure(seconds: list[float]) -> Measurement:
            weights = federations.read(path).weights
            return Measurement(seconds, 3.0, 100.0, 120.0, 0.5, *work, weights)

        yield peers.REFERENCE, lambda: measure([9.0, 1.0, 2.0, 1.5])
        yield "other", lambda: measure([1.0, 6.0, 5.0, 6.0])
        yield "third", "it is not installed"

    monkeypatch.setattr(peers, "systems", systems)
    ratios, figures = peers.compare(Scenario("six", (*WORK, "data.limit=120")), rounds=4)
    assert ratios == {f"six: other over {peers.REFERENCE}": 4.0}
    assert figures["systems"]["other"]["parameters"] == 106_533
    assert figures["systems"]["other"]["weight_difference"] == 0
    assert json.loads(json.dumps(figures))["skipped"] == {"third": "it is not installed"}
    printed = capsys.readouterr().out
    assert "4.00x" in printed
    assert "third: skipped, it is not installed" in printed
