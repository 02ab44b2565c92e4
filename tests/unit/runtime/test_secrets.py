"""Secrets reach the code that needs them, and no file and no output of a command."""

import inspect
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
from conftest import SMALL, invoke
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import OmegaConf

from fedlight.compose import register_resolvers
from fedlight.config import CellConfig, _keys
from fedlight.experiment.targets import STAGES, TARGETS
from fedlight.federation.federation_config import TRAINER_ARGUMENTS
from fedlight.runs.plan import read_launches
from fedlight.runtime import environment
from fedlight.runtime.secret import is_secret, masked, move_to_environment, redacted

Command = Callable[..., int]

SENTINELS = (
    "sesame-one",
    "sesame, two",
    "sesame-three",
    "sesame-four",
    "sesame-five",
    "sesame-six",
    "sesame-7",
)
CELL = [*SMALL, "rounds=0", "clients=2,3", "name=grid"]

RECORDER = """
from lightning.pytorch.loggers import CSVLogger

MORE = {
    "access_tokens": ["sesame-five", "sesame-six"],
    "server": "https://me:sesame-7@host/log?token=sesame-five",
    "headers": {"Authorization": "Bearer sesame-six", "cookies": ["sesame-7"], "accept": "all"},
}

def make(folder, sweep, cell, parameters, api_key, deep, **more):
    assert parameters["logger"]["api_key"] == "***", parameters
    assert "sesame" not in str(parameters)
    right = api_key == "sesame-one" and deep["passwd"] == "sesame, two" and deep["plain"] == "seen"
    right = right and more in ({}, MORE)
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


def test_secrets_of_a_sweep_reach_the_logger_and_no_file_and_no_output(
    command: Command,
    recorder: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    typed = [f"+logger.api_key={SENTINELS[0]}", f"+logger.deep={{passwd: '{SENTINELS[1]}', plain: seen}}"]
    typed += [
        "+logger.access_tokens=[sesame-five, 'sesame-six']",
        "+logger.server='https://me:sesame-7@host/log?token=sesame-five'",
        "+logger.headers={Authorization: Bearer sesame-six, cookies: [sesame-7], accept: all}",
    ]
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
def test_secrets_in_configuration_files_of_the_user_are_masked(
    command: Command, recorder: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "modules" / "logger" / "mine.yaml"
    own.parent.mkdir()
    deep = "deep: {passwd: 'sesame, two', plain: seen}"
    more = (
        "access_tokens: [sesame-five, sesame-six]\nserver: https://me:sesame-7@host/log?token=sesame-five\n"
    )
    more += "headers: {Authorization: Bearer sesame-six, cookies: [sesame-7], accept: all}\n"
    own.write_text(f"_target_: recorder_of_secrets.make\napi_key: sesame-one\n{deep}\n{more}")
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
def test_error_messages_contain_no_secret(
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
     "aws_access_key_id", "aws_secret_access_key", "private_key", "ssh-key", "+logger.api_key",
     "access_tokens", "auth_tokens", "authtoken", "authTokens", "hfToken", "HFToken", "pwd", "db_pwd",
     "api_keys", "apikeys", "APIKeys", "tokens", "AWSSecretKey", "secretkey", "bearer", "pat", "github_pat",
     "cookie",
     "sessionCookies", "Authorization", "Proxy-Authorization", "X-Api-Key", "http_auth", "webhook_url"],
)  # fmt: skip
def test_secret_keys_are_recognised(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["num_tokens", "token_dim", "tokenizer", "max_tokens", "key", "key_dim", "query_key", "keep_optimizer",
     "access", "api", "compass", "passes", "author", "PWD", "name", "keys", "secretary", "monkey", "",
     "special_tokens", "tokens_per_batch", "n_keys", "sort_keys", "keyword", "hotkey", "turkey", "patience",
     "path", "paths", "pattern", "patch_size", "pathology", "spat", "format", "cookiecutter", "authors",
     "auth_type", "OLDPWD", "SSH_AUTH_SOCK", "token_url", "bypass"],
)  # fmt: skip
def test_other_keys_are_not_secret(key: str) -> None:
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:pa:s@host/x?a=1 now", "at https://***@host/x?a=1 now"),
        ("https://ghp_0123456789abcdef@host/x", "https://***@host/x"),
        ("https://h/x?token=abc&page=1#access_token=def", "https://h/x?token=***&page=1#access_token=***"),
        ("https://h?key=abc&X-Amz-Signature=def&sig=ghi", "https://h?key=***&X-Amz-Signature=***&sig=***"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ***"),
        ("host=h user=me password=abc", "host=h user=me password=***"),
    ],
)
def test_secrets_are_recognised_by_their_form(text: str, shown: str) -> None:
    assert masked({"a": [{"b": text}]}) == {"a": [{"b": shown}]}
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    ["ssh://git@github.com/x", "tls://10.0.0.1:8786", "s3://bucket@region/x", "file:///a:b@c", "me@host.org",
     "num_tokens=3 key=5", "/data/a=b,c=d", "http://[::1]:80/@x", "12:30", "sde-dpm-solver++"],
)  # fmt: skip
def test_texts_without_secrets_are_not_masked(text: str) -> None:
    assert masked(text) == redacted(text) == text


def test_no_argument_of_a_listed_target_is_secret() -> None:
    keys = {key for key, _ in _keys(CellConfig)} | TRAINER_ARGUMENTS
    for target in chain(*TARGETS.values(), STAGES):
        keys |= set(inspect.signature(get_object(target)).parameters)
    assert len(keys) > 150
    assert [key for key in keys if is_secret(key)] == []


def test_a_flag_is_no_secret_and_a_mapping_of_secrets_is_one() -> None:
    assert masked({"auth": True, "cookie": None}) == {"auth": True, "cookie": None}
    assert masked({"credentials": {"user": "meee", "password": "sesame-8"}}) == {"credentials": "***"}
    assert redacted("meee: sesame-8") == "***: ***"


def test_no_value_of_a_shipped_configuration_is_masked(command: Command, tmp_path: Path) -> None:
    assert command(*SMALL, "rounds=0", "logger=csv", "algorithm=fedprox", "transport=inline") == 0
    (config,) = tmp_path.glob("runs/default/*/config.yaml")
    assert "***" not in config.read_text()


def test_arguments_without_secrets_are_unchanged() -> None:
    kept = ["-m", "--config-dir=/a/token", "clients=2,3", "logger={a: {num_tokens: 3}}", "sweeps=demo",
            "logger.api_key=null", "logger.api_key=${oc.env:MINE}", "logger.token=", "token"]  # fmt: skip
    found: dict[str, str] = {}
    assert move_to_environment(kept, found) == kept
    assert found == {}


@pytest.mark.parametrize(
    ("typed", "secrets"),
    [
        ("+x.access_tokens=[aaaa, 'b, b']", ["[aaaa, 'b, b']"]),
        ("+x={api_keys: [aaaa, {b: c}], y: 1, deep: {pwd: 'd}', n: 2}}", ["[aaaa, {b: c}]", "d}"]),
        ("+x.url='https://me:aaaa@host'", ["https://me:aaaa@host"]),
        ("+x=[{url: 'https://host/x?token=aaaa'}]", ["[{url: 'https://host/x?token=aaaa'}]"]),
        ("+x={credentials: {user: a, password: 'q}{'}, y: 2}", ["{user: a, password: 'q}{'}"]),
    ],
)
def test_a_moved_secret_resolves_to_the_typed_value(
    typed: str, secrets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, str] = {}
    (moved,) = move_to_environment([typed], found)
    assert sorted(found.values()) == sorted(secrets)
    assert not any(secret in moved for secret in secrets)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    register_resolvers()
    parser = OverridesParser.create()
    values = [OmegaConf.create({"x": parser.parse_override(text).value()}) for text in (typed, moved)]
    expected, arrived = (OmegaConf.to_container(value, resolve=True) for value in values)
    assert arrived == expected


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


def test_env_files_are_read_in_the_working_folder_and_the_checkout_only(
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


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        ("run", ["no-such-thing"]),
        ("sweeps", ["status", "no-such-thing"]),
        ("dashboard", ["--sweep", "no-such-thing"]),
    ],
)
def test_an_env_file_of_another_user_is_not_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    main: str,
    arguments: list[str],
) -> None:
    from importlib import import_module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOUND_PLANTED", "")
    monkeypatch.delenv("FOUND_PLANTED")
    (tmp_path / ".env").write_text("FOUND_PLANTED=yes\n")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert invoke(*arguments, main=import_module(f"fedlight.{main}").main) == 2
    assert "FOUND_PLANTED" not in os.environ
    assert f"{tmp_path}/.env belongs to another user and is not read" in capfd.readouterr().err
