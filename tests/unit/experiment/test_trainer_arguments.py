"""The permitted arguments of a client's Lightning Trainer, and their only source."""

from collections.abc import Callable

import pytest
from conftest import Cell
from hydra import compose, initialize_config_dir

from fedlight.compose import ROOT, register_resolvers
from fedlight.config import validate
from fedlight.federation.federation_config import TRAINER_ARGUMENTS
from fedlight.federation.trainer import make_trainer_factory

VALUES = {
    "accumulate_grad_batches": 2,
    "benchmark": False,
    "detect_anomaly": False,
    "deterministic": "warn",
    "gradient_clip_algorithm": "value",
    "gradient_clip_val": 0.5,
    "limit_train_batches": 0.25,
    "max_steps": 3,
}


def test_every_permitted_argument_reaches_the_trainer() -> None:
    register_resolvers()
    overrides = [f"++trainer.{name}={value}" for name, value in VALUES.items()]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = validate(compose("config", ["trainer.accelerator=cpu", *overrides]))
    trainer = make_trainer_factory(config.trainer, epochs=1)()
    assert VALUES.keys() == TRAINER_ARGUMENTS
    assert trainer.accumulate_grad_batches == 2
    assert (trainer.gradient_clip_algorithm, trainer.gradient_clip_val) == ("value", 0.5)
    assert (trainer.limit_train_batches, trainer.max_steps) == (0.25, 3)


def test_lightnings_variables_of_the_environment_change_no_cell(
    cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["clients=1", "rounds=1", "data.limit=64"]
    plain = cell(*options)
    for name, value in {"NUM_NODES": "2", "STRATEGY": "ddp", "LIMIT_TRAIN_BATCHES": "1"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    assert cell(*options).result["state_sha256"] == plain.result["state_sha256"]
