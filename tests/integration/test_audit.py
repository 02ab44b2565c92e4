"""The attacker tells the truth: a leak is found, a guarantee is not refuted, and a planted fault is."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cell, Wire, configured, invoke
from diffusers import DDPMScheduler
from hydra import compose, initialize_config_dir

from fedlight import audit
from fedlight.compose import ROOT, register_resolvers
from fedlight.config import CellConfig, validate
from fedlight.experiment.attack import Attacker, _losses, _predict_noise, _proximal_errors
from fedlight.experiment.canaries import canary_scores
from fedlight.experiment.finished import open_cell
from fedlight.federation import mechanism
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.privacy.account import Account
from fedlight.privacy.lower_bound import lower_bound, p_value
from fedlight.privacy.membership import Attack, roc
from fedlight.runtime.errors import Diverged

MakeCell = Callable[..., Cell]


def config(*arguments: str) -> CellConfig:
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


class Known:
    """A model of 100 time steps whose prediction is (1 + t) x_t; notes the time steps and labels."""

    label_dropout: float | None = None

    def __init__(self, **schedule: str) -> None:
        self.schedule = DDPMScheduler(num_train_timesteps=100, **schedule)
        self.times: list[int] = []
        self.labels: list[torch.Tensor] = []

    def denoiser(
        self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> SimpleNamespace:
        self.times.append(int(t[0]))
        if class_labels is not None:
            self.labels.append(class_labels)
        return SimpleNamespace(sample=(1 + t.view(-1, 1, 1, 1)) * x_t)

    def noisy(self, x_0: torch.Tensor, eps: torch.Tensor, t: int) -> torch.Tensor:
        kept = self.schedule.alphas_cumprod[t]
        return kept.sqrt() * x_0 + (1 - kept).sqrt() * eps


def test_the_loss_of_an_image_is_the_mean_over_ten_times_spread_evenly() -> None:
    model, x_0, labels = Known(), torch.rand(3, 1, 2, 2), torch.tensor([2, 0, 1])
    found = _losses(model, x_0, labels, torch.Generator().manual_seed(7))  # type: ignore[arg-type]
    draws, expected = torch.Generator().manual_seed(7), torch.zeros(3, dtype=torch.float64)
    for t in range(5, 100, 10):
        eps = torch.randn(3, 1, 2, 2, generator=draws)
        error = (1 + t) * model.noisy(x_0, eps, t) - eps
        expected += error.double().square().mean(dim=(1, 2, 3)) / 10
    assert model.times == list(range(5, 100, 10))
    assert not model.labels
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    model.label_dropout = 0.1
    _losses(model, x_0, labels, torch.Generator())  # type: ignore[arg-type]
    assert len(model.labels) == 10
    assert all(given is labels for given in model.labels)


def test_the_proximal_error_is_a_distance_in_l4_at_a_fifth_of_the_schedule() -> None:
    model, x_0 = Known(), torch.rand(3, 1, 2, 2)
    found = _proximal_errors(model, x_0, torch.zeros(3), torch.Generator())  # type: ignore[arg-type]
    error = x_0 - 21 * model.noisy(x_0, x_0, 20)  # at t = 0 the prediction is x_0 itself
    assert model.times == [0, 20]
    torch.testing.assert_close(found, error.double().pow(4).sum(dim=(1, 2, 3)).pow(0.25), rtol=1e-5, atol=0)


def test_a_predicted_velocity_is_turned_into_the_noise_that_was_added() -> None:
    model, x_0, eps = Known(prediction_type="v_prediction"), torch.rand(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    t = torch.tensor([3, 50, 99])
    velocity = model.schedule.get_velocity(x_0, eps, t)
    model.denoiser = lambda x_t, t: SimpleNamespace(sample=velocity)  # type: ignore[method-assign]
    x_t = model.schedule.add_noise(x_0, eps, t)
    found = _predict_noise(model, x_t, t, torch.zeros(3))  # type: ignore[arg-type]
    torch.testing.assert_close(found, eps, rtol=1e-4, atol=1e-4)


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
    cell = config("privacy.noise=3", f"privacy.noise_at={at}")
    stated = Account(3, 1, 1e-5).epsilon(4)
    bounds = [lower_bound(*canary_scores(cell, cell.privacy.noise, seed), 1e-5) for seed in range(20)]
    assert max(bounds) <= stated
    assert np.median(bounds) > 0.3


FAULTS = {
    "noise scaled by 0.1": (
        "_draw",
        lambda draw: lambda like, deviation, normal: draw(like, 0.1 * deviation, normal),
    ),
    "clipping forgotten": ("update_norm", lambda norm: lambda v, s, e: 0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = config("privacy.noise=10")
    stated = Account(10, 1, 1e-5).epsilon(4)
    assert lower_bound(*canary_scores(cell, cell.privacy.noise, 1), 1e-5) <= stated
    name, plant = FAULTS[fault]
    monkeypatch.setattr(mechanism, name, plant(getattr(mechanism, name)))
    assert lower_bound(*canary_scores(cell, cell.privacy.noise, 1), 1e-5) > stated


def test_without_noise_the_canaries_tell_all() -> None:
    assert lower_bound(*canary_scores(config("privacy.noise=0"), 0.0, 1), 1e-5) > 3
    at_most = max(lower_bound(np.ones(n), np.zeros(n), 1e-3) for n in (25, 50, 100, 500, 1000))
    found = lower_bound(*canary_scores(config("privacy.noise=0", "privacy.delta=1e-3"), 0.0, 1), 1e-3)
    assert 1.5 < at_most == pytest.approx(found, abs=0.2)


# --- cells ---


@pytest.mark.parametrize("model", [(), ("model=unet2d", "+model.unet.dropout=0.5")])
def test_an_attacker_scores_images_of_both_sides_under_what_it_saw(
    model: tuple[str, ...], cell: MakeCell, wire: Wire
) -> None:
    """The server sees the decoder of one client: what it does to the loss, and the client's own model."""
    small = ("clients=2", "data.limit=60", "transport=inline")
    made = open_cell(cell("method=UDEC", *small, *model).folder)
    sent = {(update.round, update.client): update for update in wire.updates}
    attacker = Attacker(made, images=12, clients=1, seed=3)
    data, shares = attacker._parts.dataset, attacker._parts.client_indices
    module = attacker._parts.model

    def losses(state: dict[str, torch.Tensor], images: Any, indices: np.ndarray) -> np.ndarray:
        chosen = np.sort(np.random.default_rng(3).permutation(indices)[:12])
        module.load_state_dict(state)
        module.eval()
        x_0 = images.pixels[chosen].float() / 127.5 - 1
        with torch.no_grad():
            found = _losses(module, x_0, torch.zeros(12), torch.Generator().manual_seed(3))
        return found.numpy()

    both = (data.train, shares[1]), (data.test, np.arange(len(data.test)))
    by_loss, by_pia = attacker._attack_model(1)
    assert (by_loss.observed, by_loss.name, by_pia.name) == ("model of client 1", "loss", "PIA")
    for scores, side in zip((by_loss.members, by_loss.others), both, strict=True):
        np.testing.assert_allclose(scores, -losses(made.state(1), *side), rtol=1e-6)
    assert by_pia.members.shape == by_pia.others.shape == (12,)
    assert (by_pia.members < 0).all()

    decoder, whole = attacker._attack_updates()
    assert (decoder.observed, whole.observed) == (
        "update of client 0: decoder",
        "update of client 0: all slices",
    )
    np.testing.assert_array_equal(decoder.members, whole.members)  # the decoder is all that left
    server = made.server
    server.resume(ServerCheckpoint(made.folder / "checkpoint", made.folder.name, repair=False), before=2)
    before, seen = server.global_state(), sent[2, 0].payloads["decoder"].tensors
    for scores, side in zip((whole.members, whole.others), ((data.train, shares[0]), both[1]), strict=True):
        drop = losses(before, *side) - losses({**before, **seen}, *side)
        np.testing.assert_allclose(scores, drop, rtol=1e-6)
        assert abs(drop).max() > 0


def test_an_audit_of_secret_noise_counts_no_release(cell: MakeCell) -> None:
    noise = ("privacy=example", "privacy.secure_noise=true", "privacy.draws=1")
    made = cell(*noise, "clients=2", "rounds=1", "data.limit=40", "transport=inline").folder
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert (made / "checkpoint" / "releases-000000").read_bytes() == b"."
    attacker = Attacker(open_cell(made), images=5, clients=1, seed=0)
    assert [attack.observed for attack in attacker._attack_model(None)] == ["released model"] * 2
    *slices, whole = attacker._attack_updates()
    assert (len(slices), whole.observed) == (3, "update of client 0: all slices")
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


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
