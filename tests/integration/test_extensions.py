"""Errors out of a user's own code: the message names it, and says what was expected and what came."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL

OWN = """
import numpy as np, torch
from diffusers import ConfigMixin, ModelMixin
from fedlight.data import digits
from fedlight.data.dataset import Dataset, Images
from fedlight.diffusion.unet import Prediction
from fedlight.federation.algorithms.fedavg import FedAvg

def floats():
    return Dataset(Images(torch.zeros(200, 1, 8, 8), np.zeros(200, np.int64)), None, ("a",))

def small_labels():
    return Dataset(Images(torch.zeros(200, 1, 8, 8).byte(), np.zeros(200, np.uint8)), None, ("a",))

def lost():
    return {}["x"]

def silent():
    raise AssertionError

def pair():
    return 1, 2

class Net(ModelMixin, ConfigMixin):
    config_name = "config.json"
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)
    def forward(self, x, t):
        return self.predict(self.layer(x))

class Plain(Net):
    def predict(self, x): return {}["sample"]

class Double(Net):
    def predict(self, x): return Prediction(x.double())

class Flat(FedAvg):
    def step(self, theta, mean, extras, state):
        return {name: tensor.flatten() for name, tensor in mean.items()}, state

class Lost(FedAvg):
    def callbacks(self, received, extras, memory):
        return memory["y"]
"""
NET = ["~model.slices", "+model.slices={all:[layer]}", "~model.unet", "+model.unet={_target_:own.%s}"]
ALGORITHM = "+algorithm={name:own,_target_:own.%s}"
HINT = "; HYDRA_FULL_ERROR=1 shows the traceback"
CASES = {
    "pixels as floats": (
        ["data.source._target_=own.floats"],
        r"pixels must be torch.uint8 of shape \(n, .*, got torch.float32 of shape \(200, 1, 8, 8\)",
    ),
    "labels as bytes": (
        ["data.source._target_=own.small_labels"],
        r"labels must be numpy.int64 .*, got uint8 of shape \(200,\)",
    ),
    "a data set that raises": (["data.source._target_=own.lost"], f"data own.lost: KeyError: 'x'{HINT}"),
    "a data set that raises nothing to read": (
        ["data.source._target_=own.silent"],
        f"data own.silent: AssertionError{HINT}",
    ),
    "no data set": (["data.source._target_=own.pair"], "data own.pair must return a Dataset, got tuple"),
    "a backbone that raises": (
        [*NET[:3], NET[3] % "Plain"],
        r"model.unet own.Plain, called as unet\(x_t, t\).sample with x_t of torch.float32 and shape "
        rf"\(n, \(1, 8, 8\)\): KeyError: 'sample'{HINT}",
    ),
    "a backbone of another type": (
        [*NET[:3], NET[3] % "Double"],
        r"own.Double predicts \(1, 8, 8\) of torch.float64 for images of \(1, 8, 8\) of torch.float32",
    ),
    "an algorithm of other shapes": (
        [ALGORITHM % "Flat"],
        r"algorithm own.Flat: step returned torch.float32 of shape \(\d+,\) for unet.*, "
        r"expected torch.float32 of shape \(",
    ),
}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.delitem(sys.modules, "own", raising=False)


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES)
def test_an_error_names_what_was_expected_and_what_came(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command(*SMALL, "clients=2", *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(message, line), line


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["inline", "processes"])
def test_an_error_in_training_names_whose_it_is_wherever_it_trains(
    command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], transport: str
) -> None:
    asked = [f"transport={transport}", "clients=2", "trainer.workers=2", ALGORITHM % "Lost"]
    assert command(*SMALL, *asked) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    message = f"algorithm own.Lost: KeyError: 'y'{HINT}"
    assert line == f"fedlight: error: {message}"
    (result,) = tmp_path.glob("runs/default/*/result.json")
    assert json.loads(result.read_text())["error"] == message
