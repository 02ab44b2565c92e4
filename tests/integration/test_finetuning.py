"""Cells that fine-tune a pretrained model: what is sent and stored, restarts, models, bad input."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Cell, Wire, invoke, slow
from diffusers import DDPMPipeline
from pretrained import save_pretrained, tiny_unet
from safetensors import safe_open

from fedlight import audit, export
from fedlight.experiment.finished import open_cell
from fedlight.federation.messages import Payload
from fedlight.federation.server import Server
from fedlight.finetuning.adapters import ADAPTER_FILE, ADAPTER_FOLDER
from fedlight.runs.identity import read_config
from fedlight.runtime.signals import Interrupted

MakeCell = Callable[..., Cell]
LORA = ("finetuning=lora", "finetuning.rank=2", "finetuning.targets=[attention,convolutions]", "clients=2")


def frozen_tensors() -> list[bytes]:
    """The bytes of the pretrained tensors, of those that are too long to occur elsewhere by chance."""
    arrays = (tensor.contiguous().numpy() for tensor in tiny_unet().state_dict().values())
    return [np.ascontiguousarray(array).tobytes() for array in arrays if array.size > 8]


@pytest.mark.parametrize(
    ("method", "transform"),
    [
        ("UDEC", "none"),
        pytest.param("FULL", "int4_huffman", marks=pytest.mark.slow),
        pytest.param("USPLIT", "none", marks=pytest.mark.slow),
    ],
)
def test_what_is_frozen_is_in_no_message_no_memory_and_no_checkpoint(
    cell: MakeCell, wire: Wire, pretrained: str, method: str, transform: str
) -> None:
    made = cell(
        *LORA, pretrained, f"method={method}", f"transform={transform}", "algorithm=scaffold", "fraction=0.5",
        "clients=3", "rounds=3", "transport=inline",
    )  # fmt: skip
    messages = [*wire.broadcasts, *wire.updates]
    names = {
        name for message in messages for payload in message.payloads.values() for name in payload.tensors
    }
    assert names
    stored = []
    files = [
        path
        for path in made.folder.rglob("*")
        if path.is_file() and (path.suffix == ".safetensors" or "updates" in path.parts)
    ]
    assert any("server-" in path.name for path in files)
    assert any("clients" in path.parts for path in files)
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as tensors:
            stored += list(tensors.keys())
    for name in chain(names, stored):
        assert ".lora_" in name or "delta/" in name or name.startswith("privacy"), name
    contents = [path.read_bytes() for path in files]
    contents += [
        t.contiguous().numpy().tobytes()
        for m in messages
        for p in m.payloads.values()
        for t in p.tensors.values()
    ]
    for tensor in frozen_tensors():
        assert not any(tensor in content for content in contents)
    assert not (made.folder / "model").exists()


def count_bytes(payload: Payload) -> int:
    """Of the tensors in a message, as it was written and read again."""
    return sum(tensor.contiguous().numpy().nbytes for tensor in payload.tensors.values())


@pytest.mark.parametrize("tuning", [("finetuning=full",), *slow(LORA)])
@pytest.mark.parametrize("transform", ["none", *slow("int4_huffman")])
def test_the_first_model_is_not_sent_and_the_ledger_counts_what_is(
    cell: MakeCell, wire: Wire, pretrained: str, tuning: tuple[str, ...], transform: str
) -> None:
    made = cell(
        *tuning, pretrained, f"transform={transform}", "clients=3", "fraction=0.67", "rounds=3",
        "transport=inline",
    )  # fmt: skip
    assert all(not broadcast.payloads for broadcast in wire.broadcasts if broadcast.round == 1)
    later = [broadcast for broadcast in wire.broadcasts if broadcast.round > 1]
    assert all(broadcast.payloads.keys() == {"encoder", "bottleneck", "decoder"} for broadcast in later)
    counted = [
        (message.round, message.client, direction, name, payload.params, count_bytes(payload))
        for direction, messages in (("down", wire.broadcasts), ("up", wire.updates))
        for message in messages
        for name, payload in message.payloads.items()
    ]
    ledger = [
        (
            int(row["round"]),
            int(row["client"]),
            row["direction"],
            row["slice"],
            int(row["params"]),
            int(row["bytes"]),
        )
        for row in made.rows("ledger.csv")
    ]
    assert sorted(counted) == sorted(ledger)
    assert made.result["exchange"]["bytes_total"] == sum(row[-1] for row in ledger)


def test_full_fine_tuning_starts_from_the_pretrained_weights(cell: MakeCell, pretrained: str) -> None:
    untrained = cell("finetuning=full", pretrained, "rounds=0")
    for name, tensor in tiny_unet().state_dict().items():
        assert torch.equal(untrained.model[name], tensor), name
    trained = cell("finetuning=full", pretrained, "rounds=1", "clients=2")
    assert any(not torch.equal(trained.model[name], t) for name, t in tiny_unet().state_dict().items())


@pytest.mark.parametrize(
    "extra",
    [
        ("transform=best", "algorithm=localadam"),
        ("algorithm=flexlora", "method=UDEC"),
        *slow(("method=UDEC_WARM", "finetuning.train=b"), ("privacy=client",)),
    ],
)
def test_a_cell_that_is_stopped_goes_on_to_the_same_bits(
    cell: MakeCell, pretrained: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    arguments = (*LORA, pretrained, "rounds=3", "transport=inline", *extra)
    whole = cell(*arguments)
    finish, rounds = Server.finish_round, []

    def stop_once(server: Server) -> Any:
        rounds.append(server.round)
        if len(rounds) == 2:
            raise Interrupted(15)
        return finish(server)

    monkeypatch.setattr(Server, "finish_round", stop_once)
    assert invoke(*SMALL, "name=stopped", *arguments) not in (0, 1, 2)
    assert invoke(*SMALL, "name=stopped", *arguments) == 0
    (folder,) = tmp_path.glob("runs/stopped/*/")
    assert len(rounds) == 4
    assert Cell(folder).digest == whole.digest


@pytest.mark.slow  # starts a process of its own
@pytest.mark.parametrize(
    "chosen", [(), ("algorithm=flexlora", "finetuning.rank=[1,3,2]", "transform=int4_huffman", "method=UDEC")]
)
def test_processes_give_the_same_bits_as_one(
    cell: MakeCell, pretrained: str, chosen: tuple[str, ...]
) -> None:
    arguments = (*LORA, pretrained, "clients=3", *chosen)
    one = cell(*arguments, "transport=inline")
    several = cell(*arguments, "transport=processes", "transport.workers=2")
    assert one.digest == several.digest


@pytest.mark.slow
def test_fused_clients_train_their_adapters_as_they_do_alone(cell: MakeCell, pretrained: str) -> None:
    arguments = (*LORA, pretrained, "clients=3", "rounds=1", "method=LOCAL", "transport=inline")
    alone, fused = (open_cell(cell(*arguments, *extra).folder) for extra in ([], ["trainer.fuse=3"]))
    for client in range(3):
        states = [opened.state(client) for opened in (alone, fused)]
        first = alone.server.global_state()
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=1e-4)
        assert any(not torch.equal(tensor, first[name]) for name, tensor in states[1].items())


@pytest.mark.slow
def test_example_level_privacy_trains_adapters_alone(cell: MakeCell, wire: Wire, pretrained: str) -> None:
    made = cell(*LORA, pretrained, "finetuning.train=b", "privacy=example", "transport=inline")
    assert made.result["privacy"]["epsilon"] > 0
    names = {name for update in wire.updates for p in update.payloads.values() for name in p.tensors}
    assert names
    assert all(".lora_B." in name for name in names)


def test_models_of_a_cell_are_opened_exported_and_loaded_by_diffusers_alone(
    cell: MakeCell, pretrained: str, tmp_path: Path
) -> None:
    made = cell(*LORA, pretrained, "method=UDEC", "rounds=1")
    opened = open_cell(made.folder)
    merged = opened.model(1)
    assert merged.unet.state_dict().keys() == tiny_unet().state_dict().keys()
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    opened.module.load_state_dict(opened.state(1))
    with torch.no_grad():
        expected = opened.module.unet(x_t, 5).sample
        before = tiny_unet()(x_t, 5).sample
    assert invoke(str(made.folder), "--client", "1", "--out", "exported", main=export.main) == 0
    loaded = DDPMPipeline.from_pretrained("exported", trust_remote_code=True)
    with torch.no_grad():
        for unet in (merged.unet, loaded.unet):
            torch.testing.assert_close(unet(x_t, 5).sample, expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-4
    assert loaded.scheduler.config.prediction_type == "v_prediction"

    assert invoke(str(made.folder), "--client", "1", "--adapter", "--out", "adapter", main=export.main) == 0
    with safe_open(tmp_path / "adapter" / ADAPTER_FILE, "pt") as tensors:
        assert all(name.startswith("unet.") and ".lora_" in name for name in tensors.keys())  # noqa: SIM118
    assert opened.sample(0, images=2).shape == (2, 1, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [("transform=int8",), ("finetuning.rank=[1,2]", "algorithm=scaffold")])
def test_an_adapted_model_and_its_updates_are_attacked(
    cell: MakeCell, pretrained: str, chosen: tuple[str, ...]
) -> None:
    made = cell(*LORA, pretrained, "method=UDEC", "rounds=2", *chosen)
    assert invoke(str(made.folder), "--client", "0", "--images", "20", main=audit.main) == 0
    attacks = json.loads((made.folder / "audit.json").read_text())["attacks"]
    assert {"update of client 0: decoder"} <= {attack["sees"] for attack in attacks}


def test_a_global_model_is_saved_as_its_adapters(cell: MakeCell, pretrained: str) -> None:
    made = cell(*LORA, pretrained, "rounds=1")
    (path,) = (made.folder / ADAPTER_FOLDER).iterdir()
    assert path.name == ADAPTER_FILE
    assert f"{ADAPTER_FOLDER}/{ADAPTER_FILE}" in (made.folder / "files.sha256").read_text()


def test_weights_are_named_by_their_hash_in_the_id_wherever_they_lie(
    cell: MakeCell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = save_pretrained(tmp_path / "here")
    made = cell("finetuning=full", f"finetuning.pretrained={first}", "rounds=0", "clients=2")
    assert len(read_config(made.folder / "config.yaml")["finetuning"]["sha256"]) == 64
    moved = first.rename(tmp_path / "there")
    arguments = (*SMALL, f"name={made.folder.parent.name}", "finetuning=full", "rounds=0", "clients=2")
    assert invoke(*arguments, f"finetuning.pretrained={moved}") == 0
    assert "done already" in capsys.readouterr().out
    other = save_pretrained(tmp_path / "other", "UNet2DModel")
    assert invoke(*arguments, f"finetuning.pretrained={other}") == 0
    assert len(list(made.folder.parent.glob("FULL-*"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetuning=lora"], "finetuning.pretrained must be set"),
        (["finetuning=full", "finetuning.pretrained=/nowhere"], "there is no folder /nowhere"),
        ([*LORA, "PRETRAINED", "finetuning.rank=0"], "finetuning.rank must be an integer of at least 1, a"),
        ([*LORA, "PRETRAINED", "finetuning.targets=[to_x]"], "the pretrained model has no layer to_x"),
        ([*LORA, "PRETRAINED", "finetuning.targets=[mid.attention.qkv]"], "slice encoder"),
        ([*LORA, "PRETRAINED", "finetuning.train=a"], "finetuning.train: input should be 'both' or 'b'"),
        ([*LORA, "PRETRAINED", "model=tiny"], "choose model=pretrained"),
        ([*LORA, "PRETRAINED", "model.conditional=true"], "is not conditioned on labels"),
        ([*LORA, "PRETRAINED", "data=fmnist", "data.channels=3"], "data.channels"),
        ([*LORA, "PRETRAINED", "algorithm=flexlora", "finetuning.train=b"], "with finetuning.train=both"),
        ([*LORA, "PRETRAINED", "algorithm=flexlora", "aggregation=secure"], "that takes the plain mean"),
        ([*LORA, "PRETRAINED", "finetuning.rank=10000"], "finetuning.rank=10000: the weights of"),
        (["model=pretrained"], "by finetuning=full or finetuning=lora"),
        (["data.only=[zebra]"], "data.only names zebra"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    pretrained: str,
    arguments: list[str],
    message: str,
) -> None:
    typed = [pretrained if argument == "PRETRAINED" else argument for argument in arguments]
    assert command(*SMALL, *typed) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("fedlight: error: ")
    assert message in line
    assert not list(Path().glob("runs/*/*/result.json"))


def test_dry_shows_what_is_trained_what_is_frozen_and_memory(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], pretrained: str
) -> None:
    assert command(*SMALL, *LORA, pretrained, "--dry") == 0
    shown = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in tiny_unet().parameters())
    assert f"{total:,}" in shown
    assert "trained" in shown
    assert "frozen" in shown
    assert "memory of a step" in shown
