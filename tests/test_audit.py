"""The attacker tells the truth: a leak is found, a guarantee is not refuted, and a planted fault is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cell, configured, invoke
from hydra import compose, initialize_config_dir

from fedlight import audit
from fedlight.config import CellConfig, validate
from fedlight.experiment.attack import _losses, _proximal_errors
from fedlight.experiment.canaries import canary_scores
from fedlight.federation import mechanism
from fedlight.privacy.account import Account
from fedlight.privacy.lower_bound import lower_bound, p_value
from fedlight.privacy.membership import Attack, roc
from fedlight.run import ROOT, register_resolvers
from fedlight.runtime.errors import Diverged

MakeCell = Callable[..., Cell]


def settings(*arguments: str) -> CellConfig:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return validate(compose("config", ["privacy=client", "rounds=4", *arguments]))


# --- scores ---


def test_auc_and_rates_by_counting() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 300).round(1), rng.normal(0, 1, 200).round(1)
    pairs = members[:, None] - others[None, :]
    summary = Attack("model", "test", members, others).summary(1e-5)
    auc, low, high = summary["auc"]
    assert auc == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert low < auc < high
    assert low == pytest.approx(auc - 1.96 * 0.021, abs=0.015)
    threshold = np.sort(others)[-3]
    assert (others > threshold).mean() <= 0.01
    assert summary["tpr_at_0.01"][0] == (members > threshold).mean()
    assert summary["tpr_at_0.001"][0] == (members > others.max()).mean()
    points = np.array(roc(members, others))
    assert points[0].tolist() == [0, (members > others.max()).mean()]
    assert np.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(auc, abs=0.02)


def test_a_model_drowned_in_noise_is_scored_all_the_same() -> None:
    module, _ = configured(ROOT / "configs" / "model" / "tiny.yaml", 8)
    images = torch.rand(40, 1, 8, 8) * 2 - 1
    torch.nn.init.constant_(module.unet.head.out.weight, 1e15)
    for score in (_losses, _proximal_errors):
        with torch.no_grad():
            found = score(module, images, torch.zeros(40), torch.Generator().manual_seed(0))
        assert found.isfinite().all()
        assert len(found.unique()) > 30


def test_scores_that_are_no_numbers_are_not_ranked() -> None:
    with pytest.raises(Diverged, match="update of client 0: predictions are not finite"):
        Attack("update of client 0", "loss drop", np.array([1.0, np.nan]), np.array([0.0]))


# --- the lower bound ---


def test_the_p_value_without_delta_is_binomial() -> None:
    from scipy.stats import binom

    right = np.exp(1.0) / (1 + np.exp(1.0))
    assert p_value(100, 40, 35, 1.0, 0.0) == pytest.approx(binom.sf(34, 40, right))
    assert p_value(100, 40, 35, 1.0, 1e-3) > p_value(100, 40, 35, 1.0, 0.0)


def test_randomised_response_is_not_refuted_beyond_its_epsilon_and_nearly_reached() -> None:
    epsilon, found = 2.0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = rng.random(2000) < 0.5
        answers = np.where(rng.random(2000) < 1 / (1 + np.exp(-epsilon)), truth, ~truth).astype(float)
        found.append(lower_bound(answers[truth], answers[~truth], 0.0))
    assert np.mean(np.array(found) > epsilon) <= 0.1
    assert np.median(found) > 1.5


def test_scores_that_say_nothing_refute_nothing() -> None:
    rng = np.random.default_rng(0)
    found = [lower_bound(rng.random(300), rng.random(300), 1e-5) for _ in range(40)]
    assert np.mean(np.array(found) > 0) <= 0.1


# --- canaries ---


@pytest.mark.slow
@pytest.mark.parametrize("at", ["server", "clients"])
def test_no_audit_refutes_the_stated_epsilon_in_twenty(at: str) -> None:
    cell = settings("privacy.noise=3", f"privacy.noise_at={at}")
    stated = Account(3, 1, 1e-5).epsilon(4)
    bounds = [lower_bound(*canary_scores(cell, seed), 1e-5) for seed in range(20)]
    assert max(bounds) <= stated
    assert np.median(bounds) > 0.3


FAULTS = {
    "noise scaled by 0.1": (
        "_draw",
        lambda draw: lambda like, deviation, normal: draw(like, 0.1 * deviation, normal),
    ),
    "clipping forgotten": ("_norm", lambda norm: lambda v, s, e: 0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = settings("privacy.noise=10")
    stated = Account(10, 1, 1e-5).epsilon(4)
    assert lower_bound(*canary_scores(cell, 1), 1e-5) <= stated
    name, plant = FAULTS[fault]
    monkeypatch.setattr(mechanism, name, plant(getattr(mechanism, name)))
    assert lower_bound(*canary_scores(cell, 1), 1e-5) > stated


def test_without_noise_the_canaries_tell_all() -> None:
    assert lower_bound(*canary_scores(settings("privacy.noise=0"), 1), 1e-5) > 3
    at_most = max(lower_bound(np.ones(n), np.zeros(n), 1e-3) for n in (25, 50, 100, 500, 1000))
    found = lower_bound(*canary_scores(settings("privacy.noise=0", "privacy.delta=1e-3"), 1), 1e-3)
    assert 1.5 < at_most == pytest.approx(found, abs=0.2)


# --- cells ---


@pytest.mark.slow
def test_an_overfitted_cell_is_caught(cell: MakeCell) -> None:
    made = cell(
        "data.limit=60", "clients=2", "rounds=3", "epochs=60", "optimizer.lr=2e-3", "transport=inline"
    )
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    assert invoke(str(made.folder), main=audit.main) == 0
    found = json.loads((made.folder / "audit.json").read_text())
    by_name = {(attack["sees"], attack["attack"]): attack for attack in found["attacks"]}
    assert by_name["released model", "PIA"]["auc"][1] > 0.8
    assert max(attack["epsilon_lower"] for attack in found["attacks"]) > 1
    whole = by_name["update of client 0: all slices", "loss drop"]
    assert whole["auc"][0] > 0.9
    assert set(made.result["slices"]) == {
        sees.partition(": ")[2] for sees, _ in by_name if sees.startswith("update of client 1")
    } - {"all slices"}
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_a_private_cell_is_not_refuted(cell: MakeCell, capsys: pytest.CaptureFixture[str]) -> None:
    made = cell("method=UDEC", "clients=3", "privacy=client", "privacy.noise=3")
    assert invoke(str(made.folder), "--client=1", main=audit.main) == 0
    found = json.loads((made.folder / "audit.json").read_text())
    assert 0 < found["canaries"]["epsilon_lower"] <= found["stated"]["epsilon"]
    sees = [attack["sees"] for attack in found["attacks"]]
    assert "update of client 0: decoder" in sees
    assert not any("encoder" in seen for seen in sees if seen.startswith("update"))
    stated = made.result
    stated["privacy"]["epsilon"] = found["canaries"]["epsilon_lower"] / 2
    (made.folder / "result.json").write_text(json.dumps(stated))
    assert invoke(str(made.folder), "--client=1", main=audit.main) == 1
    assert "the guarantee is broken" in capsys.readouterr().err


def test_what_cannot_be_audited_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(str(tmp_path), main=audit.main) == 2
    assert invoke(str(tmp_path), "--images=1", main=audit.main) == 2
    assert "holds no completed cell" in capsys.readouterr().err
