"""The environment of a command: `.env`, empty variables, and locales other than UTF-8."""

import ast
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SMALL, invoke

from fedlight import report, sweeps
from fedlight.runtime import environment
from fedlight.runtime.environment import load_environment

Command = Callable[..., int]

ROOT = Path(__file__).parents[3]
OTHERS = (
    "os.open",
    "Image.open",
    "tarfile.open",
    "self._downlink.open",
    "webbrowser.open",
)  # open no text file
CELL = [*SMALL, "rounds=0", "clients=2", "trainer.workers=1", "name=grid"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, no checkout, and an environment that is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path / "checkout")
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def test_an_empty_value_in_the_file_counts_as_unset(folder: Path) -> None:
    (folder / ".env").write_text("FEDLIGHT_FMNIST=\nWANDB_MODE=''\nOWN=\nFEDLIGHT_CIFAR10=' '\nWANDB_TEAM\n")
    (folder / "checkout").mkdir()
    (folder / "checkout" / ".env").write_text("FEDLIGHT_FMNIST=/data\n")
    for name in ("WANDB_MODE", "FEDLIGHT_FMNIST"):
        os.environ.pop(name, None)
    load_environment()
    assert os.environ["FEDLIGHT_FMNIST"] == "/data"
    assert {"WANDB_MODE", "OWN", "FEDLIGHT_CIFAR10", "WANDB_TEAM"}.isdisjoint(os.environ)


def test_empty_variables_of_fedlight_and_wandb_are_removed_and_others_stay(folder: Path) -> None:
    os.environ |= {"FEDLIGHT_WORKERS": "", "WANDB_PROJECT": " ", "CUDA_VISIBLE_DEVICES": ""}
    (folder / ".env").write_text("WANDB_PROJECT=mine\n")
    load_environment()
    assert "FEDLIGHT_WORKERS" not in os.environ
    assert os.environ["WANDB_PROJECT"] == "mine"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_variable_of_the_environment_takes_precedence_over_the_file(folder: Path) -> None:
    os.environ["WANDB_PROJECT"] = "typed"
    (folder / ".env").write_text("WANDB_PROJECT=file\nWANDB_ENTITY=${WANDB_PROJECT}-team\n")
    os.environ.pop("WANDB_ENTITY", None)
    load_environment()
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_ENTITY"]) == ("typed", "typed-team")


def test_a_tilde_in_a_path_is_the_home_folder(folder: Path) -> None:
    os.environ |= {"HOME": "/home/me", "FEDLIGHT_CACHE": "~/cache", "WANDB_PROJECT": "~"}
    (folder / ".env").write_text("FEDLIGHT_CELEBA=~/celeba\nWANDB_DIR=~\nWANDB_CACHE_DIR=~/w\n", "utf-8-sig")
    load_environment()
    names = ("FEDLIGHT_CACHE", "FEDLIGHT_CELEBA", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_PROJECT")
    assert [os.environ[name] for name in names] == [
        "/home/me/cache",
        "/home/me/celeba",
        "/home/me",
        "/home/me/w",
        "~",
    ]


@pytest.mark.parametrize("line", ["FEDLIGHT_CACHE=", "FEDLIGHT_WORKERS=", "WANDB_ENTITY="])
def test_a_cell_with_an_empty_value_is_the_cell_without_it(command: Command, folder: Path, line: str) -> None:
    os.environ.pop(line[:-1], None)
    os.environ["HOME"] = str(folder / "home")
    assert command(*CELL, "name=without") == 0
    (folder / ".env").write_text(f"{line}\n")
    assert command(*CELL, "name=empty") == 0
    names = [{path.name for path in (folder / "runs" / sweep).iterdir()} for sweep in ("without", "empty")]
    assert names[0] == names[1]
    assert {path.name for path in folder.iterdir()} <= {".env", "runs", "home"}


# ---- locales


def text_files_without_encoding(path: Path) -> list[str]:
    """The calls of a module that read or write text by the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        name = called.rpartition(".")[2]
        strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        binary = any("b" in value for value in strings if set(value) <= set("rwabx+t"))
        opens = name == "open" and called not in OTHERS
        text = name in ("read_text", "write_text") or (opens and not binary) or "text" in keywords
        if text and "encoding" not in keywords:
            found.append(f"{path.name}:{node.lineno} {called}")
    return found


def test_every_text_file_is_opened_in_a_named_encoding() -> None:
    rooms = ("fedlight", "hydra_plugins", "benchmarks")
    modules = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(modules) > 100
    assert [call for module in modules for call in text_files_without_encoding(module)] == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_character_prints_a_replacement(
    folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert invoke("-m", *CELL, "output=猫", "clients=2,3") == 0
    terminal.flush()
    printed = terminal.buffer.getvalue().decode(encoding)
    assert "report ?/grid" in printed
    assert len(list(folder.glob("猫/grid/*/result.json"))) == 2


@pytest.mark.slow
def test_all_commands_of_a_sweep_work_in_a_locale_without_utf_8(folder: Path) -> None:
    """POSIX is another name of the locale C."""
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def call(module: object, *arguments: str) -> str:
        command = [sys.executable, "-m", str(module), *arguments]
        done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, check=True)
        return done.stdout.decode("ascii")

    assert "done" in call("fedlight.run", "-m", *CELL, "clients=2,3", "hydra/launcher=local")
    assert "2 done" in call(sweeps.__name__, "status", "runs/grid")
    assert "2 done" in call(report.__name__, "runs/grid")
    page = (folder / "runs" / "grid" / "report" / "index.html").read_text(encoding="utf-8")
    assert "–" in page
