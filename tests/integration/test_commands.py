"""python -m fedlight.sample, fedlight.export and fedlight.prepare."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SLICE_PREFIXES, SMALL, Cell, invoke, slow
from PIL import Image
from safetensors.torch import load_file

from fedlight import export, prepare, sample
from fedlight.__main__ import main as fedlight_main
from fedlight.data.download import download
from fedlight.evaluation import classifier
from fedlight.experiment.finished import open_cell
from fedlight.federation.site import client_memory
from fedlight.runtime import progress

MakeCell = Callable[..., Cell]
CONFIGS = Path(__file__).parents[2] / "configs"


# ---- fedlight VERB


def test_a_verb_of_the_command_is_the_module_of_that_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("run", "clients=0", main=fedlight_main) == 2
    assert "clients: input should be greater" in capfd.readouterr().err
    assert invoke("sweeps", "status", "nowhere", main=fedlight_main) == 2
    assert "nowhere is no folder" in capfd.readouterr().err
    assert invoke("ru", main=fedlight_main) == 2
    assert "unknown verb ru; there are run, extend, sweeps" in capfd.readouterr().err


def test_the_shell_completes_verbs_keys_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("completion", main=fedlight_main) == 0
    script = capsys.readouterr().out

    def complete(line: str) -> set[str]:
        typed = line.split(" ")
        ask = f"COMP_LINE={line!r}; COMP_POINT={len(line)}; COMP_CWORD={len(typed) - 1}; COMP_WORDS=({line})"
        ask += '; _fedlight; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert complete("fedlight s") == {"sweeps", "sample"}
    assert complete("fedlight run partition=la") == {"label_skew"}
    assert complete("fedlight run -m evaluation.st") == {"evaluation.steps="}
    assert complete("fedlight run sweeps=de") == {"demo"}
    assert complete("fedlight report ru") == set()  # a path, which bash completes by default
    assert "complete -o default " in script


def test_help_says_what_every_key_means_and_what_may_be_chosen(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke("--help") == 0
    error_line = capfd.readouterr().out
    for group in ("evaluation", "trainer", "method", "data", "partition", "optimizer"):
        files = (CONFIGS / group).glob("*.yaml")
        keys = {key for file in files for key in yaml.safe_load(file.read_text())}
        for key in keys - {"name", "source", "deal", "_target_", "fused"}:
            assert re.search(rf"^  {group}\.{key} +\S", error_line, re.MULTILINE), key
    for group, choice in (("sweeps", "demo"), ("hydra/launcher", "slurm"), ("method", "UDEC")):
        section = error_line.partition(f"\n{group}=...")[2].partition("\n\n")[0]
        assert re.search(rf"^ +{choice} +\S", section, re.MULTILINE), group


# ---- sample


def test_images_of_the_federated_model_come_as_a_grid_or_each_in_a_file(
    finished: MakeCell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = finished("clients=2")
    folder = str(made.folder)
    assert invoke(folder, "--images", "5", main=sample.main) == 0
    assert invoke(folder, "--images", "5", "--out", "one/by/one", main=sample.main) == 0
    assert "5 images in one/by/one/" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 10
    files = sorted((tmp_path / "one" / "by" / "one").iterdir())
    assert [file.name for file in files] == [f"{number:05d}.png" for number in range(5)]
    found = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
    assert torch.equal(found, open_cell(made.folder).sample(images=5)[:, 0])

    assert invoke(folder, "--images=5", "--scale=8", "--out=large", main=sample.main) == 0
    assert invoke(folder, "--images=5", "--scale=3", "--animate", main=sample.main) == 0
    large = np.asarray(Image.open(tmp_path / "large" / "00004.png"))
    assert (large == np.kron(found[4].numpy(), np.ones((8, 8), np.uint8))).all()
    with Image.open(tmp_path / "grid.gif") as film:
        assert (film.n_frames, film.size) == (
            2,
            (3 * (3 * 8 + 2), 3 * (2 * 8 + 1)),
        )  # two steps; 3 x 2 images
        film.seek(1)
        corner = np.asarray(film.convert("L"))[1 : 3 * 8 : 3, 1 : 3 * 8 : 3]
    assert (corner == found[0].numpy()).all()
    assert invoke(folder, "--animate", "--out=film.png", main=sample.main) == 2


def test_each_client_draws_from_its_own_model_and_the_seed_decides(
    finished: MakeCell, tmp_path: Path
) -> None:
    folder = str(finished("method=UDEC", "clients=2").folder)
    asked = {"a": "--client=0", "b": "--client=0", "c": "--client=1", "d": "--client=0 --seed=1"}
    for out, options in asked.items():
        assert invoke(folder, *options.split(), "--images=1", f"--out={out}", main=sample.main) == 0
    drawn = {out: (tmp_path / out / "00000.png").read_bytes() for out in asked}
    assert drawn["a"] == drawn["b"]
    assert len(set(drawn.values())) == 3


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("UDEC", [], "method UDEC trains a model for each client: choose one by --client (client=), 0 to 1"),
        ("UDEC", ["--client=2"], "client must be 0 to 1, got 2"),
        ("UDEC", ["--client=-1"], "client must be 0 to 1, got -1"),
        ("FULL", ["--client=0"], "method FULL trains one global model: leave out client"),
        ("FULL", ["--images=0"], "--images must be 1 or more, got 0"),
        ("FULL", ["--out=taken"], "taken"),
    ],
)
def test_a_model_that_is_not_there_is_told_in_one_line(
    finished: MakeCell,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    method: str,
    options: list[str],
    message: str,
) -> None:
    folder = finished(f"method={method}", "clients=2", "rounds=0").folder
    (tmp_path / "taken").touch()
    capfd.readouterr()
    assert invoke(str(folder), *options, main=sample.main) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fedlight: error: ")
    assert message in line
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "taken"}


def test_a_folder_without_a_completed_cell_is_told(
    finished: MakeCell, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished("rounds=0").folder
    result = folder / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "status": "interrupted"}))
    for place, message in (
        (folder, "holds no completed cell: it is interrupted\n"),
        (tmp_path / "nowhere", "nowhere holds no completed cell\n"),
        (folder.parent, "holds no completed cell\n"),
    ):
        capfd.readouterr()
        assert invoke(str(place), main=sample.main) == 2
        assert capfd.readouterr().err.endswith(message)


# ---- export

WITHOUT_FEDLIGHT = """
import sys
sys.modules["fedlight"] = None  # importing it fails
from diffusers import DDPMPipeline
from safetensors.torch import save_file
pipeline = DDPMPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
save_file(pipeline.unet.state_dict(), sys.argv[2])
assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
"""


@pytest.mark.slow
def test_an_exported_model_is_the_client_s_own_and_loads_where_fedlight_is_not(
    finished: MakeCell, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = finished("method=UDEC", "clients=2")
    assert not (made.folder / "model").exists()
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    assert invoke(str(made.folder), "--client=1", "--out=out", main=export.main) == 0
    assert 'DDPMPipeline.from_pretrained("out", trust_remote_code=True)' in capsys.readouterr().out
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    typed = [sys.executable, "-c", WITHOUT_FEDLIGHT, "out", "loaded.safetensors"]
    subprocess.run(typed, cwd=tmp_path, check=True)
    loaded = load_file(tmp_path / "loaded.safetensors")
    memory = client_memory(made.folder / "checkpoint", made.folder.name).read(1, 2)["model"]
    private = [name for name in loaded if not name.startswith(SLICE_PREFIXES["decoder"])]
    assert {f"unet.{name}" for name in private} == memory.keys()
    assert all(torch.equal(loaded[name], memory[f"unet.{name}"]) for name in private)
    assert invoke(str(made.folder), "--client=0", "--out=out", main=export.main) == 2
    assert "out is there already" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["tiny", *slow("unet2d")])
def test_an_exported_conditional_model_draws_the_labels_that_its_card_says(
    cell: MakeCell,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    few = ["clients=2", "rounds=1", "model.conditional=true", "model.schedule.num_train_timesteps=20"]
    made = cell(*few, f"model={model}")
    assert invoke(str(made.folder), "--out=out", main=export.main) == 0
    assert "(class_labels=[...])" in capsys.readouterr().out
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path / "out")
    card: dict[str, Any] = {}
    exec(Path("README.md").read_text().split("```python")[1].split("```")[0], card)
    assert [image.size for image in card["images"]] == [(8, 8), (8, 8)]

    def draw(labels: list[int], guidance: float) -> np.ndarray:
        noise = torch.Generator().manual_seed(0)
        return card["pipeline"](
            class_labels=labels, guidance_scale=guidance, generator=noise, output_type="np"
        ).images

    unet, scheduler, noise = open_cell(made.folder).module.unet, card["pipeline"].scheduler, torch.Generator()
    unet.load_state_dict(made.model)
    noise.manual_seed(0)
    x = torch.randn((2, 1, 8, 8), generator=noise)
    with torch.no_grad():
        for t in range(19, -1, -1):
            given, without = (
                unet(x, torch.tensor(t), class_labels=torch.tensor(y)).sample for y in ([3, 9], [10, 10])
            )
            x = scheduler.step(without + 2 * (given - without), t, x, generator=noise).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.allclose(draw([3, 9], 2.0), expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"class_labels must be 0 to 9, got \[10\]"):
        draw([10], 1.0)


def test_only_what_is_trained_is_exported(
    cell: MakeCell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cell("method=UDEC", "clients=2", "rounds=0")
    assert invoke(str(made.folder), "--out=out", main=export.main) == 2
    assert "choose one by --client (client=), 0 to 1" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


# ---- prepare


@pytest.mark.parametrize("asked", [[], ["evaluation.reference=train"], ["evaluation.memorisation=true"]])
def test_after_preparing_a_cell_finds_all_it_needs(
    cell: MakeCell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
) -> None:
    monkeypatch.setattr(classifier, "EPOCHS", 2)
    monkeypatch.setenv("FEDLIGHT_CACHE", str(tmp_path / "cache"))
    asked = [*asked, "rounds=0", "evaluation.samples=65"]
    torch.set_num_threads(2)  # as a login node may
    assert invoke(*SMALL, *asked, main=prepare.main) == 0
    error_line = capsys.readouterr().out
    assert "data digits: 120 training and 360 test images" in error_line
    assert "extractor classifier: ready, test accuracy" in error_line
    prepared = files(tmp_path / "cache")
    assert len(prepared) == (3 if "evaluation.memorisation=true" in asked else 2)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    assert cell(*asked).result["fid"]["value"] > 0
    assert files(tmp_path / "cache") == prepared
    assert torch.get_num_threads() == 1  # the cell's own number, which references depend on


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """What the cache holds; a file that is made anew has another inode."""
    status = {path: path.stat() for path in folder.rglob("*.safetensors")}
    return {path: (found.st_ino, found.st_mtime_ns) for path, found in status.items()}


def test_what_a_cell_could_not_do_cannot_be_prepared(
    command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert invoke("evaluation.samples=3", main=prepare.main) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "evaluation.samples must be more than 64" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_long_work_tells_of_itself_without_a_terminal_and_clears_up_after_a_kill(
    cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0)
    monkeypatch.setattr(classifier, "EPOCHS", 2)
    monkeypatch.setenv("FEDLIGHT_CACHE", str(tmp_path / "cache"))
    cell("clients=3", "evaluation.samples=65")
    error_line = capfd.readouterr().err
    for line in (
        r"training the classifier of the scores: 3 of \d+, about 0:00:\d\d left",
        r"FULL-K3-\S+: round 1 of 2, 1 of 3 clients, about \d:\d\d:\d\d left",
        r"FULL-K3-\S+: round 2 of 2, ",
        r"sampling: 1 of 2 denoising steps|sampling: 2 of 2 denoising steps",
    ):
        assert re.search(f"^fedlight: {line}", error_line, re.MULTILINE), (line, error_line)

    (made,) = (tmp_path / "cache" / "classifier").glob("*.safetensors")
    made.unlink()
    left = made.with_name(f".tmp-{made.stem}-{'0' * 32}.safetensors")
    other = made.with_name(f".tmp-other-{'0' * 32}.safetensors")
    left.touch()
    other.touch()
    assert invoke(*SMALL, "evaluation.samples=65", main=prepare.main) == 0
    assert made.is_file()
    assert (left.exists(), other.exists()) == (False, True)


def test_what_a_killed_download_left_is_cleared_up(tmp_path: Path) -> None:
    (tmp_path / ".celeba.killed").mkdir()
    download(tmp_path / "celeba", lambda folder: Path(folder, "celeba").mkdir(), "CelebA", "")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["celeba"]
