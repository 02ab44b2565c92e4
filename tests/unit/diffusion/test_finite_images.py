"""A cell whose model predicts values that are not finite fails, and so do the commands that draw from it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Cell, invoke
from diffusers import DDPMPipeline

from fedlight import sample

OWN = """
import torch
from diffusers import ConfigMixin, ModelMixin
from fedlight.diffusion.unet import Prediction

class Net(ModelMixin, ConfigMixin):
    config_name = "config.json"
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)
        self.norm = torch.nn.BatchNorm2d(1)
    def forward(self, x, t):
        x = self.norm(self.layer(x))
        return Prediction(x if self.training else x + float("inf"))
"""
NET = ["~model.slices", "+model.slices={all:[layer,norm]}", "~model.unet", "+model.unet={_target_:own.Net}"]
FEW = [*SMALL, "clients=2", "rounds=1"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone whose predictions are finite in training only."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)


@pytest.mark.parametrize(
    ("method", "model"), [("FULL", "the global model"), ("UDEC", r"the model of client 0")]
)
def test_a_cell_fails_whose_images_are_not_finite(
    own: None,
    command: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    method: str,
    model: str,
) -> None:
    slices = ["method.downlink=[all]", "method.uplink=[all]"] if method == "UDEC" else []
    assert command(*FEW, *NET, *slices, f"method={method}", "evaluation.grid=4") == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    expected = f"{model} after round 1 draws images that are not finite, from denoising step 1 of 2"
    assert expected in line
    (folder,) = tmp_path.glob("runs/default/*/")
    result = Cell(folder).result
    assert (result["status"], result["fid"]) == ("failed", None)
    assert expected in result["error"]
    assert not list(folder.glob("samples/round_*.png"))
    assert not (folder / "model").exists()


def test_no_image_that_is_not_finite_is_written_by_the_sample_command(
    own: None, command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(*FEW, *NET) == 0
    (folder,) = tmp_path.glob("runs/default/*/")
    capfd.readouterr()
    assert invoke(str(folder), "--trust", "--out", "images", main=sample.main) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "the global model draws images that are not finite" in line
    assert not (tmp_path / "images").exists()


def test_a_schedule_of_zero_snr_is_refused_before_anything_is_written_or_draws_with_the_velocity(
    command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    zero = "+model.schedule.rescale_betas_zero_snr=true"
    assert command(*FEW, zero) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "+model.schedule.prediction_type=v_prediction" in line
    assert not (tmp_path / "runs").exists()
    velocity = "+model.schedule.prediction_type=v_prediction"
    assert command(*FEW, zero, velocity, "evaluation.grid=4", "evaluation.sampler=ddim") == 0
    (folder,) = tmp_path.glob("runs/default/*/")
    pipeline = DDPMPipeline.from_pretrained(folder / "model")  # as others load it
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
