"""The `fid` entry of `result.json`, computed by hand from the scores of three models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import config

from fedlight.evaluation.scores import METRICS
from fedlight.experiment.fid_entry import fid_entry
from fedlight.experiment.model_evaluation import ModelEvaluation

EXTRACTOR: Any = SimpleNamespace(name="classifier", accuracy=0.9, sha256="0" * 64)


def evaluation(fid: float, **others: float) -> ModelEvaluation:
    metrics = {"fid": fid, **dict.fromkeys(METRICS, 0.1), "inception_score": 2 * fid}
    return ModelEvaluation(torch.empty(0), metrics | others, None)


def test_a_mean_is_taken_over_the_clients_that_have_the_metric() -> None:
    evaluations: dict[int | None, ModelEvaluation] = {
        0: evaluation(1.0, **{"label_accuracy.all": 0.2, "label_accuracy.held": 0.4, "own_fid": 3.0}),
        3: evaluation(2.0, **{"label_accuracy.all": 0.6, "own_fid": 5.0}),
        7: evaluation(6.0, **{"label_accuracy.all": 0.1}),
    }
    entry = fid_entry(evaluations, None, EXTRACTOR, config("method=UDEC"), trained=8)
    assert (entry["scope"], entry["clients"], entry["trained_clients"]) == ("clients", [0, 3, 7], 8)
    assert (entry["value"], entry["per_client"]) == (3.0, [1.0, 2.0, 6.0])
    assert entry["std"] == pytest.approx(7**0.5)  # of a sample: (4 + 1 + 9) / 2
    assert entry["inception_score"] == 6.0
    assert entry["label_accuracy"] == pytest.approx({"all": 0.3, "held": 0.4, "unseen": None})
    assert entry["own"] == {"value": 4.0, "per_client": [3.0, 5.0, None]}
    assert "coverage" not in entry


def test_the_global_model_has_no_entries_of_clients() -> None:
    entry = fid_entry({None: evaluation(1.5)}, None, EXTRACTOR, config("method=FULL"), trained=2)
    assert (entry["scope"], entry["value"], entry["std"]) == ("global", 1.5, None)
    assert {entry[key] for key in ("per_client", "clients", "trained_clients", "own")} == {None}


def test_the_bootstrap_has_an_entry_where_it_is_configured() -> None:
    models: dict[int | None, ModelEvaluation] = {
        0: evaluation(1.0, fid_standard_error=0.3),
        1: evaluation(3.0, fid_standard_error=0.4),
    }
    entry = fid_entry(models, None, EXTRACTOR, config("method=UDEC", "evaluation.bootstrap=20"), trained=2)
    assert entry["bootstrap"] == pytest.approx(
        {"draws": 20, "standard_error": 0.25, "low": 2 - 0.49, "high": 2 + 0.49}, abs=1e-3
    )
    assert "bootstrap" not in fid_entry(models, None, EXTRACTOR, config("method=UDEC"), trained=2)
