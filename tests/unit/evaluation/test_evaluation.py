"""The evaluation of cells: which models are scored, when, against which images, and reproducibly."""

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Cell, slow
from frechet import frechet

from fedlight.data import digits
from fedlight.evaluation.extractor import Extractor
from fedlight.evaluation.reference import make_reference
from fedlight.evaluation.scores import metric_names, score
from fedlight.experiment.finished import open_cell
from fedlight.experiment.scored_models import scored_clients
from fedlight.reporting.summaries import by_cell
from fedlight.runs.status import read_sweep
from fedlight.runtime.seeds import derive_seed, stream

MakeCell = Callable[..., Cell]

SAMPLES = 65  # one more than the features
SCORED = [f"evaluation.samples={SAMPLES}"]


@pytest.mark.parametrize("method", ["UDEC", *slow("ULATDEC", "LOCAL")])
def test_where_clients_keep_slices_each_client_is_scored_with_mean_and_deviation(
    cell: MakeCell, digits_classifier: Extractor, method: str
) -> None:
    made = cell(f"method={method}", "clients=3", *SCORED)
    fid = made.result["fid"]
    assert fid["scope"] == "clients"
    assert fid["clients"] == [0, 1, 2]
    finished, real = open_cell(made.folder), digits_classifier(digits.load().test.pixels).values
    for client, value in enumerate(fid["per_client"]):
        images = finished.sample(client, SAMPLES, seed=derive_seed(2023, "sample", 2, client))
        assert value == pytest.approx(frechet(digits_classifier(images).values, real), rel=1e-6)
    assert len(set(fid["per_client"])) == 3
    assert fid["value"] == pytest.approx(statistics.mean(fid["per_client"]), rel=1e-12)
    assert fid["std"] == pytest.approx(statistics.stdev(fid["per_client"]), rel=1e-12)
    assert [row["fid"] for row in made.rows("rounds.csv")] == ["", repr(fid["value"])]


@pytest.mark.parametrize("method", ["FULL", *slow("USPLIT", "CENTRAL")])
def test_where_all_slices_are_federated_the_global_model_is_scored(
    cell: MakeCell, digits_classifier: Extractor, method: str
) -> None:
    made = cell(f"method={method}", "clients=2", *SCORED)
    fid = made.result["fid"]
    assert (fid["scope"], fid["per_client"], fid["clients"], fid["std"]) == ("global", None, None, None)
    images = open_cell(made.folder).sample(None, SAMPLES, seed=derive_seed(2023, "sample", 2, 0))
    real = digits_classifier(digits.load().test.pixels).values
    assert fid["value"] == pytest.approx(frechet(digits_classifier(images).values, real), rel=1e-6)


def test_the_fid_entry_records_the_settings_of_the_evaluation(
    cell: MakeCell, digits_classifier: Extractor, cache: Path
) -> None:
    made = cell("rounds=0", *SCORED)
    fid = made.result["fid"]
    settings = {key: fid[key] for key in ("extractor", "samples", "sampler", "steps", "reference")}
    assert settings == {
        "extractor": "classifier",
        "samples": SAMPLES,
        "sampler": "sde-dpm-solver++",
        "steps": 2,
        "reference": "test",
    }
    assert fid["extractor_accuracy"] == digits_classifier.accuracy
    assert fid["extractor_sha256"] == digits_classifier.sha256
    assert fid["memorisation"] is None
    images = open_cell(made.folder).sample(None, SAMPLES, seed=derive_seed(2023, "sample", 0, 0))
    real = make_reference(digits.load().test.pixels, digits_classifier, str(cache))
    expected = score(digits_classifier(images), real)  # compared with torch-fidelity in test_scores
    assert fid["value"] == pytest.approx(expected.pop("fid"), rel=1e-9)
    assert {key: fid[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    assert expected.keys() == set(metric_names("classifier"))


@pytest.mark.slow
def test_the_same_command_gives_the_same_scores_and_scoring_changes_no_model(cell: MakeCell) -> None:
    options = ["method=UDEC", "clients=2"]
    first, second = (cell(*options, *SCORED, "evaluation.every=1") for _ in range(2))
    unscored = cell(*options, "evaluation.grid=0")
    assert first.result["fid"] == second.result["fid"]
    fids = [row["fid"] for row in first.rows("rounds.csv")]
    assert fids == [row["fid"] for row in second.rows("rounds.csv")]
    assert len(set(fids)) == 2
    assert fids[-1] == repr(first.result["fid"]["value"])
    assert unscored.result["fid"] is None
    assert {row["fid"] for row in unscored.rows("rounds.csv")} == {""}
    for sha256 in ("state_sha256", "client_sha256"):
        assert first.result[sha256] == unscored.result[sha256]


@pytest.mark.slow
def test_the_same_clients_are_scored_in_every_round(cell: MakeCell) -> None:
    options = ["method=UDEC", "clients=4", "evaluation.clients=2", "evaluation.every=1", "rounds=3"]
    made = cell(*options, *SCORED, "logger=csv")
    fid = made.result["fid"]
    assert len(fid["clients"]) == len(fid["per_client"]) == 2
    assert set(fid["clients"]) < set(range(4))
    with (made.folder / "metrics" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scored = [{key for key, value in row.items() if key.startswith("client_fid/") and value} for row in rows]
    assert scored == [{f"client_fid/{client}" for client in fid["clients"]}] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("digits_classifier")
def test_clients_that_never_trained_are_not_scored(cell: MakeCell) -> None:
    options = ["method=UDEC", "clients=6", "fraction=0.34", "evaluation.every=1", "evaluation.clients=3"]
    made = cell(*options, *SCORED, "federation.dropout=0.3", "rounds=4", "logger=csv", "seed=9")
    reported: list[set[int]] = []
    for round_ in range(1, 5):
        rows = [row for row in made.rows("ledger.csv") if int(row["round"]) == round_]
        before = reported[-1] if reported else set()
        reported.append(before | {int(row["client"]) for row in rows if row["direction"] == "up"})
    met = {int(row["client"]) for row in made.rows("ledger.csv")}
    assert reported[-1] < met < set(range(6))  # some only dropped out, some were never drawn
    fid = made.result["fid"]
    assert set(fid["clients"]) <= reported[-1]
    assert len(fid["clients"]) == min(3, len(reported[-1]))
    assert fid["trained_clients"] == len(reported[-1])
    assert fid["value"] == pytest.approx(statistics.mean(fid["per_client"]))
    for row, trained in zip(made.rows("metrics/metrics.csv"), reported, strict=True):
        scored = {
            int(key.split("/")[1]) for key, value in row.items() if key.startswith("client_fid/") and value
        }
        assert scored <= (trained or set(range(6)))
        assert len(scored) == min(3, len(trained) or 6)
    (line,) = by_cell(read_sweep(made.folder.parent)).data
    assert line["scored_clients"] == len(fid["clients"])


@pytest.mark.parametrize("clients", [3, "all"])
def test_the_scored_clients_are_the_same_before_training_and_after_all_have_trained(
    clients: int | str,
) -> None:
    config = SimpleNamespace(seed=2023, clients=10, evaluation=SimpleNamespace(clients=clients))
    drawn = sorted(stream(2023, "evaluation").choice(10, 3, replace=False).tolist())
    expected = drawn if clients == 3 else list(range(10))
    assert scored_clients(config, set(range(10))) == scored_clients(config, set()) == expected


def test_images_can_be_compared_with_the_training_images(
    cell: MakeCell, digits_classifier: Extractor
) -> None:
    made = cell("rounds=0", "data.limit=100", "evaluation.reference=train", *SCORED)
    assert made.result["fid"]["reference"] == "train"
    images = open_cell(made.folder).sample(None, SAMPLES, seed=derive_seed(2023, "sample", 0, 0))
    real = digits_classifier(digits.load().train.pixels[:100]).values
    expected = frechet(digits_classifier(images).values, real)
    assert made.result["fid"]["value"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_weights_of_an_unused_extractor_do_not_change_the_cell(
    cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cell("rounds=0").result["cell"]
    (tmp_path / "weights.pth").touch()
    monkeypatch.setenv("FEDLIGHT_INCEPTION", str(tmp_path / "weights.pth"))
    assert cell("rounds=0").result["cell"] == first


@pytest.mark.slow
def test_training_at_least_halves_the_fid(cell: MakeCell) -> None:
    options = ["data.limit=null", "clients=2", "data.batch_size=32", "optimizer.lr=6e-3", "epochs=5"]
    scoring = ["evaluation.samples=300", "evaluation.steps=50", "evaluation.sampler=ddpm"]
    trained, untrained = (
        cell(*options, *scoring, f"rounds={rounds}").result["fid"]["value"] for rounds in (4, 0)
    )
    assert trained <= untrained / 2
