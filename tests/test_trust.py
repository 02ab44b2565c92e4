"""A cell that comes from somebody else runs nothing of theirs when it is opened."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
import yaml
from conftest import Cell, invoke

from fedlight import sample
from fedlight.experiment.targets import check_targets
from fedlight.runtime.errors import BadInput

MakeCell = Callable[..., Cell]
ROOT = Path(__file__).parents[1]


class Trap:
    """Leaves a folder behind where a pickle of it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def plant(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the configuration of a finished cell."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def test_no_planted_payload_runs_and_the_message_says_what_would(
    cell: MakeCell, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, ran, file = cell("rounds=0").folder, tmp_path / "ran", tmp_path / "payload"
    quiet = (folder / "config.yaml").read_text()
    system = {"command": f"mkdir {ran}"}
    for key, payload in {
        "model.unet": {"_target_": "torch.load", "f": str(file), "weights_only": False},
        "model.schedule": {"_target_": "numpy.load", "file": str(file), "allow_pickle": True},
        "optimizer.eps": {"_target_": "joblib.load", "filename": str(file)},
        "algorithm": {"name": "x", "_target_": "fedlight.runtime.files.os.system", **system},
        "model.unet.channels.0": {"_target_": "fedlight.data.cifar10.pickle.load", "_partial_": True},
        "model.schedule.betas": {"_target_": "fedlight.data.digits.np.load", "file": str(file)},
        "logger": {"_target_": "torch.nn.modules.module.torch.hub.load", "repo_or_dir": str(tmp_path)},
        "data.source": {"_target_": "fedlight.sweeps.subprocess.run", "args": ["mkdir", str(ran)]},
    }.items():
        if "torch.load" in payload["_target_"]:
            torch.save(Trap(ran), file)
        elif "np" in payload["_target_"] or "numpy" in payload["_target_"]:
            with file.open("wb") as opened:
                np.save(opened, np.array([Trap(ran)], dtype=object), allow_pickle=True)
        else:
            joblib.dump(Trap(ran), file)

        def change(config: dict[str, Any], key: str = key, payload: dict[str, Any] = payload) -> None:
            *path, last = key.split(".")
            for part in path:
                config = config[part] if part != "channels" else config.setdefault(part, [None])
            config[int(last) if last == "0" else last] = payload  # type: ignore[index]

        (folder / "config.yaml").write_text(quiet)
        plant(folder, change)
        capfd.readouterr()
        assert invoke(str(folder), main=sample.main) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"fedlight: error: {folder}: {key}._target_ would run {payload['_target_']};")
        assert "--trust" in line
        assert not ran.exists(), key
        assert not (tmp_path / "grid.png").exists()


def test_the_payload_is_a_real_one(tmp_path: Path) -> None:
    for number, read in enumerate(
        (pickle.load, joblib.load, lambda file: torch.load(file, weights_only=False))
    ):
        ran, file = tmp_path / f"ran{number}", tmp_path / f"payload{number}"
        torch.save(Trap(ran), file) if number == 2 else file.write_bytes(pickle.dumps(Trap(ran)))
        with file.open("rb") as opened:
            read(opened)
        assert ran.exists()


def test_with_trust_a_user_s_own_code_runs_and_without_it_does_not(
    cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = cell("rounds=0").folder
    (tmp_path / "mine_of_trust.py").write_text(
        "import os\nos.mkdir('imported')\nfrom fedlight.federation.algorithms.fedavg import FedAvg\n"
        "class Mine(FedAvg):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plant(folder, lambda c: c.update(algorithm={"name": "mine", "_target_": "mine_of_trust.Mine"}))
    assert invoke(str(folder), "--images=1", main=sample.main) == 2
    assert "algorithm._target_ would run mine_of_trust.Mine" in capfd.readouterr().err
    assert not (tmp_path / "imported").exists()  # not even imported
    assert invoke(str(folder), "--images=1", "--trust", main=sample.main) == 0
    assert (tmp_path / "imported").exists()


def test_a_value_that_would_be_computed_is_refused(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = cell("rounds=0").folder
    monkeypatch.setenv("PLANTED", "os.system")
    for value in ("${oc.env:PLANTED}", r"\${oc.decode:'{_target_: os.system, command: ls}'}"):
        plant(folder, lambda config, value=value: config["model"]["unet"].update(widths=value))
        assert invoke(str(folder), main=sample.main) == 2
        assert "model.unet.widths would be computed from" in capfd.readouterr().err


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.nn",
        "torch.nn.functional.relu",
        "torch.nn.modules.module.functools.partial",
        "torch.nnn.Linear",
        "torch.optim.optimizer.warnings.warn",
        "diffusers.DiffusionPipeline.from_pretrained",
        "diffusers.UNet2DModel.from_pretrained",
        "diffusers.DDPMPipeline",
        "diffusers.utils.dynamic_modules_utils.get_class_from_dynamic_module",
        "diffusers.utils.import_utils.importlib.import_module",
        "fedlight.data.download.TemporaryDirectory",
        "fedlight.data.digits.load.__globals__",
        "fedlight.data.digits.no_such",
        "fedlight.sweeps.retry",
        "fedlight.runtime.files.remove_temporaries",
        "fedlight.experiment.build.make_extension",
        "fedlightly.Mine",
        "",
        ["os.system"],
        {"_target_": "os.system"},
    ],
)
def test_what_else_a_target_may_not_be(target: object) -> None:
    with pytest.raises(BadInput, match="_target_"):
        check_targets({"model": [{"unet": {"_target_": target}}]})


def test_all_that_fedlight_itself_configures_is_allowed() -> None:
    own = [*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("configs/*.yaml")]
    targets = [line.split("_target_:")[1].split("#")[0].strip() for path in own for line in _targets(path)]
    assert len(targets) > 15
    for target in targets:
        if target != "null" and "SweepWatch" not in target:  # Hydra's own part is in no cell's configuration
            check_targets({"_target_": target})
    for target in ("torch.optim.AdamW", "torch.nn.SiLU", "diffusers.UNet2DConditionModel"):
        check_targets({"_target_": target})


def _targets(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if "_target_:" in line]
