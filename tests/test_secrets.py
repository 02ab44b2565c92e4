"""A secret is in no file that a command writes and no line that it prints, and still arrives."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SMALL, invoke

from fedlight.runs.plan import read_launches
from fedlight.runtime import environment
from fedlight.runtime.secret import is_secret, move_to_environment, redacted

Command = Callable[..., int]

SENTINELS = ("sesame-one", "sesame, two", "sesame-three", "sesame-four")
CELL = [*SMALL, "rounds=0", "clients=2,3", "name=grid"]

RECORDER = """
from lightning.pytorch.loggers import CSVLogger

def make(folder, sweep, cell, parameters, api_key, deep):
    assert parameters["logger"]["api_key"] == "***", parameters
    right = api_key == "sesame-one" and deep["passwd"] == "sesame, two" and deep["plain"] == "seen"
    (folder / f"right-{right}").touch()
    return CSVLogger(folder)
"""


def holds(folder: Path) -> list[str]:
    """The files below a folder that hold a sentinel, in their content or their path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        str(path)
        for path in files
        if any(s.encode() in path.read_bytes() or s in str(path) for s in SENTINELS)
    ]


@pytest.fixture(autouse=True)
def the_environment_is_put_back() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What names a logger that notes whether the secrets have reached it."""
    module = tmp_path / "modules" / "recorder_of_secrets.py"
    module.parent.mkdir()
    module.write_text(RECORDER)
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.setenv("PYTHONPATH", f"{module.parent}:{os.environ.get('PYTHONPATH', '')}")
    return ["logger=csv", "logger._target_=recorder_of_secrets.make"]


def test_secrets_of_a_sweep_are_in_no_file_and_no_line_and_arrive(
    command: Command,
    recorder: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    typed = [f"+logger.api_key={SENTINELS[0]}", f"+logger.deep={{passwd: '{SENTINELS[1]}', plain: seen}}"]
    assert command("-m", *CELL, *recorder, *typed, "+hydra.job.env_set.AWS_SECRET_ACCESS_KEY=sesame-three",
                   "hydra.output_subdir=.hydra") == 0  # fmt: skip
    cells = list(tmp_path.glob("runs/grid/FULL-*"))
    assert len(cells) == 2
    assert all((path / "right-True").exists() for path in cells)
    assert (tmp_path / "runs" / "grid" / ".hydra" / "hydra.yaml").exists()
    assert list(tmp_path.glob("runs/grid/.plan/*.json"))
    assert holds(tmp_path / "runs") == []
    out, err = capfd.readouterr()
    assert not any(secret in out + err for secret in SENTINELS)


@pytest.mark.slow
def test_the_same_sweep_retried_takes_its_secrets_from_the_environment(
    command: Command,
    recorder: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    deep = f"+logger.deep={{passwd: '{SENTINELS[1]}', plain: seen}}"
    assert command("-m", *CELL, *recorder, f"+logger.api_key={SENTINELS[0]}", deep) == 0
    for path in tmp_path.glob("runs/grid/FULL-K2*/result.json"):
        path.unlink()
    (plan,) = read_launches(tmp_path / "runs" / "grid")
    assert command(*plan.command) == 0
    assert len(list(tmp_path.glob("runs/grid/FULL-K2*/result.json"))) == 1
    monkeypatch.delenv("FEDLIGHT_SECRET_LOGGER_API_KEY")
    for path in tmp_path.glob("runs/grid/FULL-K2*/result.json"):
        path.unlink()
    capfd.readouterr()
    assert command(*plan.command) == 2
    assert "'FEDLIGHT_SECRET_LOGGER_API_KEY' not found" in capfd.readouterr().err


@pytest.mark.slow
def test_secrets_of_a_user_s_own_files_are_masked(
    command: Command, recorder: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "modules" / "logger" / "mine.yaml"
    own.parent.mkdir()
    deep = "deep: {passwd: 'sesame, two', plain: seen}"
    own.write_text(f"_target_: recorder_of_secrets.make\napi_key: sesame-one\n{deep}\n")
    grid = tmp_path / "modules" / "sweeps" / "mine.yaml"
    grid.parent.mkdir()
    params = "{clients: '2,3', +data.passwd: sesame-four}"
    grid.write_text(f"# @package _global_\nhydra: {{mode: MULTIRUN, sweeper: {{params: {params}}}}}\n")
    folder = ["--config-dir", str(tmp_path / "modules")]
    assert command(*folder, "-m", *CELL, "logger=mine") == 0
    assert len(list(tmp_path.glob("runs/grid/*/right-True"))) == 2
    assert command(*folder, *CELL[:-2], "sweeps=mine", "name=refused") == 2
    own.unlink()
    grid.unlink()
    assert holds(tmp_path / "runs") == []
    out, err = capfd.readouterr()
    assert "data.passwd is not a key" in err
    assert not any(secret in out + err for secret in SENTINELS)


@pytest.mark.slow
def test_an_error_tells_no_secret(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "refuser.py").write_text(
        "def make(*a, api_key, **k): raise ValueError(f'{api_key} is wrong')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    one = SMALL + ["rounds=0"]
    assert command(*one, "logger._target_=refuser.make", "+logger.api_key=sesame-one") == 2
    monkeypatch.setenv("MY_OWN", "sesame-three")
    assert command(*one, "logger._target_=refuser.make", "+logger.api_key=${oc.env:MY_OWN}") == 2
    assert command(*one, "logger.api_key=sesame-four") == 2  # no such key: Hydra repeats what was typed
    assert command(*one, "trainer.accelerator.token=sesame-four") == 2
    assert command(*one, "logger=wandb", "+logger.aws_secret_access_key=sesame-four") == 2
    out, err = capfd.readouterr()
    assert err.count("*** is wrong") == 2
    assert len([line for line in err.splitlines() if line.startswith("fedlight: error:")]) == 5
    assert not any(secret in out + err for secret in SENTINELS)
    assert holds(tmp_path / "runs") == []


@pytest.mark.parametrize(
    "key",
    ["api_key", "logger.api_key", "WANDB_API_KEY", "apiKey", "apikey", "token", "hf_token", "accessToken",
     "password", "db_password", "passwd", "secret", "client_secret", "credential", "aws_credentials",
     "aws_access_key_id", "aws_secret_access_key", "private_key", "ssh-key", "+logger.api_key"],
)  # fmt: skip
def test_what_is_secret(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["num_tokens", "token_dim", "tokenizer", "max_tokens", "key", "key_dim", "query_key", "keep_optimizer",
     "access", "api", "compass", "passes", "author", "PWD", "name", "keys", "secretary", "monkey", ""],
)  # fmt: skip
def test_what_is_not(key: str) -> None:
    assert not is_secret(key)


def test_nothing_that_fedlight_configures_itself_is_masked(command: Command, tmp_path: Path) -> None:
    assert command(*SMALL, "rounds=0", "logger=csv", "algorithm=fedprox", "transport=inline") == 0
    (config,) = tmp_path.glob("runs/default/*/config.yaml")
    assert "***" not in config.read_text()


def test_arguments_without_a_secret_stay_as_they_were() -> None:
    kept = ["-m", "--config-dir=/a/token", "clients=2,3", "logger={a: {num_tokens: 3}}", "sweeps=demo",
            "logger.api_key=null", "logger.api_key=${oc.env:MINE}", "logger.token=", "token"]  # fmt: skip
    found: dict[str, str] = {}
    assert move_to_environment(kept, found) == kept
    assert found == {}


def test_two_secrets_of_one_key_are_two_variables() -> None:
    found: dict[str, str] = {}
    (moved,) = move_to_environment([r"+x={api_key: 'a\'b'},{api_key: c\,d}"], found)
    assert sorted(found.values()) == ["a'b", "c,d"]
    assert all(f"${{oc.env:{name}}}" in moved for name in found)


def test_secrets_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "sesame-one")
    monkeypatch.setenv("PASSWORD", "")
    assert redacted("it was sesame-one.") == "it was ***."


# ---- .env


def test_env_files_count_where_the_command_is_typed_and_in_the_checkout_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, checkout = tmp_path / "shared" / "here", tmp_path / "checkout"
    for folder, name in ((here.parent, "ABOVE"), (here, "HERE"), (checkout, "CHECKOUT")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".env").write_text(f"FOUND_{name}=yes\nFOUND_FIRST={name}\nFOUND_SET=file\n")
    monkeypatch.setattr(environment, "CHECKOUT", checkout)
    monkeypatch.chdir(here)
    for name in ("FOUND_ABOVE", "FOUND_HERE", "FOUND_CHECKOUT", "FOUND_FIRST"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOUND_SET", "real")
    environment.load_environment()
    found = {name: value for name, value in os.environ.items() if name.startswith("FOUND_")}
    assert found == {"FOUND_HERE": "yes", "FOUND_CHECKOUT": "yes", "FOUND_FIRST": "HERE", "FOUND_SET": "real"}


@pytest.mark.parametrize("main", ["run", "sweeps", "dashboard"])
def test_an_env_file_of_another_user_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], main: str
) -> None:
    from importlib import import_module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOUND_PLANTED", "")
    monkeypatch.delenv("FOUND_PLANTED")
    (tmp_path / ".env").write_text("FOUND_PLANTED=yes\n")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert invoke("no-such-thing", main=import_module(f"fedlight.{main}").main) == 2
    assert "FOUND_PLANTED" not in os.environ
    assert f"{tmp_path}/.env belongs to another user and is not read" in capfd.readouterr().err
