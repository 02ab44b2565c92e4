"""Opening an untrusted cell runs none of the code that it names."""

import json
import os
import pickle
import pkgutil
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib import import_module
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
import yaml
from conftest import Cell, invoke
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from trap import Trap

import fedlight
from fedlight import audit, deploy, export, sample, sweeps
from fedlight.compose import register_resolvers
from fedlight.config import validate
from fedlight.deployment.agreement import hash_agreement
from fedlight.experiment.targets import STAGES, TARGETS, check_targets
from fedlight.reporting.comparison import Comparison
from fedlight.runs.identity import read_config, write_config
from fedlight.runs.reader import CellFiles
from fedlight.runtime.errors import BadInput
from fedlight.runtime.lease import HOLDER, read_holder
from fedlight.runtime.process_record import describe_this_process

MakeCell = Callable[..., Cell]
ROOT = Path(__file__).parents[3]


def plant(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the configuration of a finished cell."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def test_no_planted_payload_runs_and_the_message_names_it(
    finished: MakeCell, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, ran, file = finished("rounds=0").folder, tmp_path / "ran", tmp_path / "payload"
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
        assert line.startswith(f"fedlight: error: {folder}: {key}._target_ would run {payload['_target_']}, ")
        assert "--trust" in line
        assert not ran.exists(), key
        assert not (tmp_path / "grid.png").exists()


def test_the_payload_runs_where_a_pickle_is_read(tmp_path: Path) -> None:
    for number, read in enumerate(
        (pickle.load, joblib.load, lambda file: torch.load(file, weights_only=False))
    ):
        ran, file = tmp_path / f"ran{number}", tmp_path / f"payload{number}"
        torch.save(Trap(ran), file) if number == 2 else file.write_bytes(pickle.dumps(Trap(ran)))
        with file.open("rb") as opened:
            read(opened)
        assert ran.exists()


def test_user_code_runs_only_with_trust(
    finished: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished("rounds=0").folder
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


def test_an_interpolated_value_is_refused(
    finished: MakeCell, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished("rounds=0").folder
    monkeypatch.setenv("PLANTED", "os.system")
    for value in ("${oc.env:PLANTED}", r"\${oc.decode:'{_target_: os.system, command: ls}'}"):
        plant(folder, lambda config, value=value: config["model"]["unet"].update(widths=value))
        assert invoke(str(folder), main=sample.main) == 2
        assert "model.unet.widths holds the interpolation" in capfd.readouterr().err


def test_no_command_runs_a_pickle_in_a_received_folder(
    finished: MakeCell, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, ran = finished("rounds=0").folder, tmp_path / "ran"
    payload = pickle.dumps((os.mkdir, str(ran)))
    call = {"_target_": "fedlight.federation.transport.dask_workers.call"}
    quiet = (folder / "config.yaml").read_text()
    for pickled, refusal in (
        (payload, "cannot be read (line "),  # YAML's !!binary
        (payload.decode("latin-1"), "model.schedule._target_ would run fedlight.federation.transport"),
    ):
        (folder / "config.yaml").write_text(quiet)
        plant(
            folder,
            lambda config, pickled=pickled: config["model"].update(schedule={**call, "pickled": pickled}),
        )
        for main, more in ((sample, []), (export, ["--out", str(tmp_path / "out")]), (audit, [])):
            assert invoke(str(folder), *more, main=main.main) == 2
            (line,) = capfd.readouterr().err.splitlines()
            assert refusal in line
        app = tmp_path / "app" / "federation" / "cell.yaml"
        app.parent.mkdir(parents=True, exist_ok=True)
        app.write_text((folder / "config.yaml").read_text())
        arguments = ["check", str(app.parent.parent), "--agreed", hash_agreement(app), "--client", "0"]
        assert invoke(*arguments, main=deploy.main) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert refusal in line
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
    function, *rest = pickle.loads(payload)  # noqa: S301  # it is a real one
    function(*rest)
    assert ran.exists()


# ---- other files of a received folder


def test_control_characters_in_a_received_text_are_escaped(
    finished: MakeCell, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = finished("rounds=0").folder
    plant(folder, lambda config: config["model"]["unet"].update(_target_="x\x1b[2J\ny.z"))
    assert invoke(str(folder), main=sample.main) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert r"would run x\x1b[2J y.z, and permitted are" in line
    result = json.loads((folder / "result.json").read_text()) | {
        "status": "failed",
        "error": "a\x1b]0;b\x07\nc",
    }
    (folder / "result.json").write_text(json.dumps(result))
    assert invoke("status", str(folder.parent), main=sweeps.main) == 0
    out = capfd.readouterr().out
    assert r"a\x1b]0;b\x07 c" in " ".join(out.split())
    assert "\x1b" not in out


def test_deeply_nested_json_is_a_damaged_file(finished: MakeCell, capfd: pytest.CaptureFixture[str]) -> None:
    folder = finished("rounds=0").folder
    (folder / "audit.json").write_text("[" * 200_000)
    assert CellFiles(folder).audit.attacks == []
    (folder / HOLDER).write_text("[" * 200_000)
    assert read_holder(folder) is None
    (folder / "result.json").write_text("[" * 200_000)
    assert len(CellFiles(folder).check()) == 1
    assert invoke(str(folder), main=sample.main) == 2
    assert "holds no completed cell" in capfd.readouterr().err


@pytest.mark.parametrize("change", [{"pid": "../../1"}, {"job": 12}, {"since": None}, {"more": 1}])
def test_a_holder_file_with_wrong_types_is_ignored(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / HOLDER).write_text(json.dumps(asdict(describe_this_process())))
    assert read_holder(tmp_path) is not None
    (tmp_path / HOLDER).write_text(json.dumps(asdict(describe_this_process()) | change))
    assert read_holder(tmp_path) is None


def test_the_name_of_a_data_set_cannot_escape_its_folder() -> None:
    assert Comparison("../../x/y", "classifier", [], {}, {}).key == "_x_y_classifier_5ff709c3"
    assert Comparison("photos.v2_0a1b", None, [], {}, {}).key == "photos.v2_0a1b"

    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", overrides=["data.name=../../x"])
    with pytest.raises(BadInput, match=r"data\.name: string should match pattern"):
        validate(config)


# ---- YAML


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!binary aGFsbG8=", "line 1 holds a binary, which is no plain value"),
        ("a: 1\nb: !!python/name:os.system ''", "line 2 holds a python/name:os.system"),
        ("!!python/object/apply:os.system ['true']", "python/object/apply:os.system"),
        ("a: !!set {x, y}", "holds a set"),
        ("a: !!omap [x: 1]", "holds a omap"),
        ("a: !mine x", "holds a !mine"),
        ("a: 2023-01-01", "holds a timestamp"),
        ("a: {<<: {b: 1}}", "has a key that is no text"),
        ("1: x", "has a key that is no text"),
        ("? [a, b]\n: x", "has a key that is no text"),
        ("a: &x [1]\nb: *x", "it refers to an anchor, *x"),
        ("a: &x\n  b: *x", "it refers to an anchor, *x"),
        ("a: " + "[" * 200_000, "nest"),
        ("a: " + "{a: " * 50 + "1" + "}" * 50, "deeper than 32 levels"),
        ("a: " + "x" * 300_000, "it is larger than 262,144 bytes"),
        ("a: " + "1" * 10_000, "limit"),
        ("a: [1", "expected"),
        ("a: \x00", "not allowed"),
    ],
)
def test_yaml_other_than_a_plain_configuration_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as refused:
        read_config(path)
    assert str(refused.value).startswith(f"{path} cannot be read (")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert CellFiles(tmp_path).config == {}
    assert len(CellFiles(tmp_path).check()) == 1


def test_a_billion_laughs_document_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [lol]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    started = time.perf_counter()
    with pytest.raises(BadInput, match=r"anchor, \*a0"):
        read_config(path)
    assert time.perf_counter() - started < 1


def test_a_written_configuration_is_read_back_unchanged(tmp_path: Path) -> None:
    plain = {"a": [1, -2.5, True, None, "no", "2023-01-01", "1", "é\n"], "b": {"c": {}, "d": []}, "e": 1e-05}
    write_config(tmp_path / "config.yaml", plain)
    assert read_config(tmp_path / "config.yaml") == plain


# ---- the targets that a configuration may name

PLACES = {**TARGETS, "transform.up.0": STAGES, "transform.down.0": STAGES}
"""Key of the configuration -> the permitted values of `_target_` there."""
PLAIN = "only text, numbers, true, false, null, lists and mappings are permitted"
LISTED = frozenset().union(*PLACES.values())


def at(place: str, node: object) -> dict[str, Any]:
    """A configuration that has a node in one place."""
    for part in reversed(place.split(".")):
        node = [node] if part == "0" else {part: node}
    return node  # type: ignore[return-value]


def is_admitted(place: str, target: object, **arguments: object) -> bool:
    try:
        check_targets(at(place, {"_target_": target, **arguments}))
    except BadInput:
        return False
    return True


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.nn",
        "torch.nn.Linear",
        "torch.nn.functional.relu",
        "torch.nn.modules.module.functools.partial",
        "torch.optim.Optimizer",
        "torch.optim.optimizer.warnings.warn",
        "diffusers.DiffusionPipeline.from_pretrained",
        "diffusers.UNet2DModel.from_pretrained",
        "diffusers.UNet2DModel.load_config",
        "diffusers.DDPMPipeline",
        "diffusers.utils.dynamic_modules_utils.get_class_from_dynamic_module",
        "diffusers.utils.import_utils.importlib.import_module",
        "fedlight.data.download.TemporaryDirectory",
        "fedlight.data.placeholder.load",
        "fedlight.data.digits.load.__globals__",
        "fedlight.data.digits.no_such",
        "fedlight.diffusion.unet.ConvNextUNet.from_pretrained",
        "fedlight.federation.transport.dask_workers.call",
        "fedlight.federation.messages.from_bytes",
        "fedlight.sweeps.retry",
        "fedlight.runtime.files.remove_temporaries",
        "fedlight.experiment.setup.make_extension",
        "fedlightly.Mine",
        "",
        ["os.system"],
        {"_target_": "os.system"},
        None,
    ],
)
def test_unlisted_targets_are_refused_everywhere(target: object) -> None:
    assert [place for place in PLACES if is_admitted(place, target)] == (["logger"] if target is None else [])


def test_a_listed_target_is_permitted_under_its_own_key_only() -> None:
    elsewhere = (
        "trainer",
        "model",
        "model.unet.block",
        "optimizer.lr",
        "transform",
        "transform.up",
        "privacy",
    )
    for target in LISTED:
        admitted = {place for place in PLACES if is_admitted(place, target)}
        assert admitted == {place for place, listed in PLACES.items() if target in listed}
        assert not [place for place in elsewhere if is_admitted(place, target)]
        with pytest.raises(BadInput, match=f"^_target_ would run {target}, and no target is permitted$"):
            check_targets({"_target_": target})


@pytest.mark.parametrize(
    ("place", "node"),
    [
        ("optimizer", {"_target_": "torch.optim.Adam", "lr": 0.1, "_partial_": True}),
        ("optimizer", {"_target_": "torch.optim.Adam", "_args_": [[]]}),
        ("model.unet", {"_target_": "diffusers.UNet2DModel", "_convert_": "all"}),
        ("model.unet", {"_target_": "diffusers.UNet2DModel", "_recursive_": False}),
        ("model.unet", {"_target_": "diffusers.UNet2DModel", "pretrained_model_name_or_path": "x"}),
        ("model.unet", {"_target_": "diffusers.UNet2DModel", "in_channels": {"_target_": "os.getpid"}}),
        ("model.schedule", {"_target_": "diffusers.DDPMScheduler", "trained_betas": b"x"}),
        ("model.schedule", {"_target_": "diffusers.DDPMScheduler", "beta_start": {1}}),
        ("model.schedule", {"_target_": "diffusers.DDPMScheduler", 1: 2}),
        ("data.source", {"_target_": "fedlight.data.fmnist.load", "cache": Path("x")}),
        ("logger", {"_target_": "fedlight.loggers.metrics.wandb_logger", "settings": {}}),
        ("transport", {"_target_": "fedlight.federation.transport.dask.Dask", "address": "tcp://a:1"}),
        ("algorithm", {"_target_": "fedlight.federation.algorithms.fedprox.FedProx", "kwargs": {}}),
        ("trainer", {"default_root_dir": "/"}),
        ("trainer", {"model_registry": "x"}),
        ("trainer", {"strategy": "deepspeed"}),
    ],
)
def test_only_plain_arguments_of_the_target_are_permitted(place: str, node: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        check_targets(at(place, node))


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"a${x}": 1}, "model.a${x} is not a plain key: keys must be text without interpolations"),
        ({2: 1}, "model.2 is not a plain key: keys must be text without interpolations"),
        ({"a": ["b", "${x}"]}, "model.a.1 holds the interpolation '${x}': only plain values are permitted"),
        ({"a": {"b": "x${y}"}}, "model.a.b holds the interpolation 'x${y}': only plain values are permitted"),
        ({"a": (1, 2)}, f"model.a holds a value of type tuple: {PLAIN}"),
        ({"a": b"1"}, f"model.a holds a value of type bytes: {PLAIN}"),
    ],
)
def test_a_configuration_is_plain_at_any_depth(node: dict[Any, Any], reason: str) -> None:
    with pytest.raises(BadInput) as refused:
        check_targets({"model": node})
    assert str(refused.value) == reason
    check_targets({"model": {"a": [None, True, 1, 0.5, "x", {"b": []}]}, "trainer": None})


def test_every_shipped_configuration_is_permitted_when_it_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLIGHT_FMNIST", "/nowhere")
    (tmp_path / "image").touch()
    more = {"shards": ["partition.classes=2"], "image_folder": [f"data.root={tmp_path}"]}
    without = {"evaluation", "experiment", "hydra", "launcher", "method", "privacy", "sweeper", "trainer"}
    choices: dict[str, list[list[str]]] = defaultdict(list)
    seen = set()
    for path in sorted(ROOT.glob("configs/*/*.yaml")):
        text = path.read_text()
        assert path.parent.name not in without or "_target_" not in text
        if path.parent.name not in without:
            seen |= set(re.findall(r"_target_: ([\w.]+)", text)) - {"null"}
            choices[path.parent.name].append([f"{path.parent.name}={path.stem}", *more.get(path.stem, [])])
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for chosen in zip_longest(*choices.values(), fillvalue=[]):
            config = compose("config", overrides=[*chain(*chosen)])
            file = tmp_path / "config.yaml"
            write_config(file, validate(config).plain())
            check_targets(read_config(file))
    assert len(seen) > 30
    assert seen <= LISTED
    ours = {t for t in LISTED if t.startswith("fedlight.")} - {"fedlight.federation.algorithms.fedavg.FedAvg"}
    assert ours <= seen  # every listed target of fedlight is named by a shipped configuration


def test_every_listed_target_exists() -> None:
    """All optimizers of torch but that of sparse gradients; Muon came with torch 2.9."""
    optimizers = {
        f"torch.optim.{name}"
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    known = optimizers - {"torch.optim.Optimizer", "torch.optim.SparseAdam"}
    assert TARGETS["optimizer"] - {"torch.optim.Muon"} == known - {"torch.optim.Muon"}
    for target in LISTED - {"torch.optim.Muon", "fedlight.federation.transport.dask.Dask"}:
        assert callable(get_object(target)), target


def callables(modules: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Everything that can be called by a dotted path: attributes of modules, and of classes in them."""
    for name, module in modules:
        for attribute, value in list(vars(module).items()):
            if callable(value):
                yield f"{name}.{attribute}", value
            if isinstance(value, type):
                yield from ((f"{name}.{attribute}.{k}", v) for k, v in vars(value).items() if callable(v))


@pytest.mark.slow
def test_of_all_callables_of_all_libraries_only_the_listed_are_permitted() -> None:
    for module in pkgutil.walk_packages(fedlight.__path__, "fedlight."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    objects = {place: {id(get_object(target)) for target in listed} for place, listed in PLACES.items()}
    modules = [(name, module) for name, module in list(sys.modules.items()) if hasattr(module, "__dict__")]
    packages = {name.partition(".")[0] for name, _ in modules}
    assert packages >= {"builtins", "os", "torch", "diffusers", "fedlight", "hydra", "numpy", "lightning"}
    tried, admitted = set(), set()
    for path, value in callables(modules):
        if path in tried:
            continue
        tried.add(path)
        for place, known in objects.items():
            if is_admitted(place, path):
                assert id(value) in known, path
                admitted.add(path)
    assert len(tried) > 100_000
    assert admitted == LISTED & tried
