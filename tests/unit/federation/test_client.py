"""A client is a pure function of a broadcast, its memory and its data; what it keeps private carries over."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch.optim import Adam
from toy import FULL, PARTIAL, Toy, ToyData, federate, inline, toy_server, toy_setup, toy_site

from fedlight.federation import journal
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client import Memory, evaluate, local_update
from fedlight.federation.codec import Codec
from fedlight.federation.federator import Federator, on_cpu
from fedlight.federation.messages import Broadcast, State, Update, from_bytes, pack, to_bytes, unpack
from fedlight.federation.transforms.sign import Sign
from fedlight.federation.transforms.topk import TopK
from fedlight.runtime import stopwatch
from fedlight.runtime.errors import BadInput, Damaged, MemoryLost
from fedlight.runtime.hashing import state_sha256

SUPPORT = Path(__file__).parents[2] / "support"

ALONE = """
import sys
from pathlib import Path
from toy import PARTIAL, toy_setup
from fedlight.federation.client import local_update
from fedlight.federation.codec import Codec
from fedlight.federation.messages import from_bytes, pack, to_bytes, unpack
from fedlight.federation.transforms.topk import TopK
folder = Path(sys.argv[1])
setup = toy_setup(PARTIAL, codec=Codec([TopK(0.5)]))
_, memory = unpack((folder / "memory").read_bytes())
update, kept = local_update(from_bytes((folder / "broadcast").read_bytes()), memory, setup)
Path(sys.argv[2]).write_bytes(to_bytes(update))
Path(sys.argv[3]).write_bytes(pack({}, kept))
"""


def broadcasts_of(setup, rounds: int, folder: Path) -> list[Broadcast]:
    """The broadcasts that client 0 receives in so many rounds of a federation of two clients."""
    server, site = toy_server(setup), toy_site(setup, folder)
    transport, seen = inline(site), []
    for _ in range(rounds):
        broadcasts = server.start_round()
        seen.append(broadcasts[0])
        for update in transport.exchange(broadcasts):
            server.receive(update)
        server.finish_round()
    return seen


@pytest.mark.slow
def test_the_same_broadcast_and_memory_give_the_same_bytes_in_two_fresh_processes(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL, codec=Codec([TopK(0.5)]))
    first, second = broadcasts_of(setup, 2, tmp_path / "site")
    _, memory = local_update(first, {}, setup)
    (tmp_path / "broadcast").write_bytes(to_bytes(second))
    (tmp_path / "memory").write_bytes(pack({}, memory))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[2] / "support")]),
    }
    outputs = []
    for number in range(2):
        files = [str(tmp_path / f"{kind}{number}") for kind in ("update", "kept")]
        command = [sys.executable, "-c", ALONE, str(tmp_path), *files]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        outputs.append([Path(file).read_bytes() for file in files])
    assert outputs[0] == outputs[1]
    update = from_bytes(outputs[0][0])
    assert isinstance(update, Update)
    assert (update.round, update.client, set(update.payloads)) == (2, 0, {"shared"})
    assert to_bytes(local_update(second, memory, setup)[0]) == outputs[0][0]


def test_private_slices_persist_and_received_slices_are_replaced(tmp_path: Path) -> None:
    """One step of SGD from a known state is computed by hand."""
    setup = toy_setup(PARTIAL, epochs=1)
    first, second = broadcasts_of(setup, 2, tmp_path)
    private = {"own.weight": torch.full((2, 3), 0.5), "own.bias": torch.tensor([1.0, -1.0])}
    received = second.payloads["shared"].tensors
    update, kept = local_update(second, {"model": private}, setup)

    rows = ToyData(0).rows  # two rows, one batch
    x, y = (torch.stack(part) for part in zip(*rows, strict=True))
    start = {name: tensor.clone().requires_grad_() for name, tensor in {**private, **received}.items()}
    hidden = x @ start["own.weight"].T + start["own.bias"]
    loss = (hidden @ start["shared.weight"].T + start["shared.bias"] - y).square().mean()
    loss.backward()
    expected = {name: (tensor - 0.05 * tensor.grad).detach() for name, tensor in start.items()}
    for name in private:
        torch.testing.assert_close(kept["model"][name], expected[name])
    for name, tensor in update.payloads["shared"].tensors.items():
        torch.testing.assert_close(tensor, expected[name])
    assert set(kept["model"]) == set(private)
    assert update.loss == pytest.approx(loss.item())
    assert update.num_examples == 2
    assert set(first.payloads) == {"own", "shared"}
    assert set(second.payloads) == {"shared"}


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_the_reported_loss_is_the_mean_over_images_for_any_accumulation_of_batches(
    tmp_path: Path, batches: int
) -> None:
    """At a vanishing rate all losses are those of the first weights: five rows, in batches of 2, 2 and 1."""
    setup = toy_setup(FULL, epochs=1, optimizer=partial(torch.optim.SGD, lr=1e-12))

    def make_trainer(callbacks: list[Any]) -> Trainer:
        trainer = setup.make_trainer(callbacks)
        trainer.accumulate_grad_batches = batches
        return trainer

    broadcast = replace(broadcasts_of(setup, 1, tmp_path)[0], client=3)
    update, _ = local_update(broadcast, {}, replace(setup, make_trainer=make_trainer))
    x, y = (torch.stack(part) for part in zip(*ToyData(3).rows, strict=True))
    toy = Toy()
    assert update is not None
    assert update.loss == pytest.approx((toy.shared(toy.own(x)) - y).square().mean().item())


def test_the_reported_loss_is_of_the_last_epoch_alone(tmp_path: Path) -> None:
    """At a vanishing rate every epoch has the loss of the first weights."""
    setup = toy_setup(FULL, epochs=3, optimizer=partial(torch.optim.SGD, lr=1e-12))
    update, _ = local_update(broadcasts_of(setup, 1, tmp_path)[0], {}, setup)
    x, y = (torch.stack(part) for part in zip(*ToyData(0).rows, strict=True))
    toy = Toy()
    assert update is not None
    assert update.loss == pytest.approx((toy.shared(toy.own(x)) - y).square().mean().item())


def test_slices_are_frozen_with_their_received_values_after_the_warm_start(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL.model_copy(update={"warm_start": 1, "freeze": ("own",)}))
    memory: Memory = {}
    for broadcast in broadcasts_of(setup, 3, tmp_path):
        frozen = broadcast.round > 1
        assert set(broadcast.payloads) == ({"own", "shared"} if broadcast.round <= 2 else {"shared"})
        came = {name: tensor for part in broadcast.payloads.values() for name, tensor in part.tensors.items()}
        came = memory.get("model", {}) | came
        update, memory = local_update(broadcast, memory, setup)
        assert set(update.payloads) == ({"shared"} if frozen else {"own", "shared"})
        for name in ("own.weight", "own.bias"):
            assert torch.equal(memory["model"][name], came[name]) == frozen
        trained = update.payloads["shared"].tensors
        assert not torch.equal(trained["shared.weight"], came["shared.weight"])
    assert all(parameter.requires_grad for parameter in setup.module.parameters())


def test_a_client_is_evaluated_with_the_slices_that_it_trained_in_the_warm_start(tmp_path: Path) -> None:
    """It keeps its private slices, though the next broadcast would replace them: it may never get one."""
    setup = toy_setup(PARTIAL.model_copy(update={"warm_start": 2}))
    server, site = toy_server(setup), toy_site(setup, tmp_path)
    (first, _) = toy_server(setup).start_round()
    for _ in federate(server, inline(site), 1):
        pass
    (request,) = server.evaluations([0], draw=False)
    trained = local_update(first, {}, setup)[1]["model"]
    assert not torch.equal(trained["own.weight"], server.theta["own.weight"])
    assert site.evaluate(request).sha256 == state_sha256({**server.global_state(), **trained})


def test_a_kept_optimizer_continues_from_its_state(tmp_path: Path) -> None:
    """Two rounds of one epoch with a kept Adam are two epochs, where nobody else takes part."""
    method = PARTIAL.model_copy(update={"keep_optimizer": True})
    setup = toy_setup(method, epochs=1, optimizer=Adam)
    first, second = broadcasts_of(setup, 2, tmp_path)
    _, memory = local_update(first, {}, setup)
    assert memory["optimizer"]["0.step"] == 1
    _, later = local_update(second, memory, setup)
    assert later["optimizer"]["0.step"] == 2
    _, anew = local_update(second, {**memory, "optimizer": {}}, setup)
    assert anew["optimizer"]["0.step"] == 1
    assert not torch.equal(anew["model"]["own.weight"], later["model"]["own.weight"])


def test_an_algorithm_gets_the_received_slices_and_the_memory_of_the_client(tmp_path: Path) -> None:
    seen: dict[str, object] = {}

    class Observed(FedAvg):
        keeps_memory = True

        def broadcast(self, state: State) -> State:
            return {"sent": torch.tensor([2.0])}

        def callbacks(self, received: State, aux: State, memory: State) -> list[Callback]:
            seen["callbacks"] = {
                name: set(part)
                for name, part in [("received", received), ("extras", aux), ("memory", memory)]
            }
            return []

        def report(self, received: State, trained: State, aux: State, memory: State, steps: int) -> Any:
            seen["report"] = {
                name: set(part)
                for name, part in [("received", received), ("extras", aux), ("memory", memory)]
            }
            seen["moved"] = any(not torch.equal(received[name], trained[name]) for name in received)
            seen["same names"] = set(received) == set(trained)
            seen["steps"] = steps
            return {}, {"kept": aux["sent"] + memory.get("kept", 0)}

    setup = toy_setup(PARTIAL, algorithm=Observed(), epochs=3)
    first, second = broadcasts_of(setup, 2, tmp_path)
    _, memory = local_update(first, {}, setup)
    assert seen["callbacks"] == seen["report"]
    assert seen["report"]["memory"] == set()  # type: ignore[index]
    _, memory = local_update(second, memory, setup)
    shared = {"shared.weight", "shared.bias"}
    assert seen["callbacks"] == {"received": shared, "extras": {"sent"}, "memory": {"kept"}}
    assert seen["report"] == seen["callbacks"]
    assert seen["moved"]
    assert seen["same names"]
    assert seen["steps"] == 3  # two rows are one batch
    assert memory["algorithm"]["kept"] == 4


def test_a_client_that_drops_out_keeps_the_received_slices_and_reports_nothing(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL)
    first, _ = broadcasts_of(setup, 2, tmp_path)
    update, memory = local_update(replace(first, drops_out=True), {}, setup)
    assert update is None
    for name, tensor in first.payloads["own"].tensors.items():
        assert torch.equal(memory["model"][name], tensor)


def test_the_server_knows_which_clients_have_reported(tmp_path: Path) -> None:
    setup = toy_setup()
    server = toy_server(setup, clients=4, dropout=0.5)
    (done,) = federate(server, inline(toy_site(setup, tmp_path)), 1)
    assert server.trained == done.client_losses.keys()
    assert 0 < len(server.trained) < 4 == len(server.met)


def test_a_server_resumes_after_the_last_stored_round_or_before_the_first(tmp_path: Path) -> None:
    setup = toy_setup(codec=Codec(down=[Sign()]))
    server, again, new = (toy_server(setup) for _ in range(3))
    checkpoint = ServerCheckpoint(tmp_path, "toy")
    for done in federate(server, inline(toy_site(setup, tmp_path / "site")), 3):
        server.save(checkpoint, {"after": done.round})
    assert sorted(path.name[:12] for path in tmp_path.glob("server-*")) == [
        "server-r0002",
        "server-r0003",
    ]
    for before, history, like in ((None, {"after": 3}, server), (3, {"after": 2}, None), (2, None, new)):
        assert again.resume(checkpoint, before) == history
        assert again.round == (history or {"after": 0})["after"]
        if like:
            sent, expected = ([*map(to_bytes, of.start_round())] for of in (again, like))
            assert sent == expected


def test_the_seconds_of_merging_are_those_of_receiving_and_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(0.0)  # before and after each of two updates is received, and before and after the step
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    setup = toy_setup()
    (done,) = federate(toy_server(setup), inline(toy_site(setup, tmp_path)), 1)
    assert done.merging == 3


def test_a_fit_without_an_image_in_its_last_epoch_counts_and_one_without_a_step_is_refused() -> None:
    module = Toy()
    trainer = SimpleNamespace(optimizers=[module.configure_optimizers()], global_step=1)
    federator = Federator([3], 2, on_cpu(module.state_dict()), None)
    federator.on_fit_start(trainer, module)
    federator.on_fit_end(trainer, module)
    assert (federator.losses, federator.steps) == ([0], [1])
    trainer.global_step = 0
    with pytest.raises(BadInput, match="client 3 trained on no image in round 2"):
        federator.on_fit_end(trainer, module)


def test_a_client_scores_its_own_model_with_its_private_slices(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL)
    server = toy_server(setup)
    server.theta = {name: tensor + 1 for name, tensor in server.theta.items()}
    memory: Memory = {"model": {"own.weight": torch.full((2, 3), 2.0), "own.bias": torch.zeros(2)}}
    first, second = server.evaluations([0, 1], draw=True)
    first_scores, second_scores = evaluate([first, second], [memory, {}], setup)
    assert (first_scores.client, second_scores.client) == (0, 1)
    assert first_scores.metrics["norm"] == pytest.approx((6 * 4) ** 0.5)
    assert second_scores.metrics["norm"] != first_scores.metrics["norm"]
    assert (second_scores.sha256, first_scores.sha256) == (
        state_sha256(server.theta),
        state_sha256(server.theta | memory["model"]),
    )
    shown = from_bytes(to_bytes(first_scores)).payloads["grid"]
    assert torch.equal(shown.tensors["pixels"], memory["model"]["own.weight"])
    assert shown.params == 6
    (silent,) = server.evaluations([0], draw=False)
    assert evaluate([silent], [memory], setup)[0].metrics == {}
    assert evaluate([silent], [memory], setup)[0].payloads == {}


def test_a_finished_update_is_not_repeated_and_its_memory_is_checked(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL)
    first, second = broadcasts_of(setup, 2, tmp_path / "other")
    site = toy_site(setup, tmp_path / "site")
    (one,) = site.update([first])
    (again,) = toy_site(setup, tmp_path / "site").update([first])
    assert one == again
    (memory,) = (tmp_path / "site" / "clients" / "000000").iterdir()
    content = memory.read_bytes()
    memory.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit of one number
    (anew,) = toy_site(setup, tmp_path / "site").update([first])
    assert anew is not None
    assert anew.path != one.path
    assert anew.read() == to_bytes(local_update(first, {}, setup)[0])
    toy_site(setup, tmp_path / "site").update([second])


def test_a_client_reports_that_its_memory_is_lost(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL)
    _, second = broadcasts_of(setup, 2, tmp_path / "other")
    with pytest.raises(MemoryLost, match="000000/r0001- is missing"):
        toy_site(setup, tmp_path / "site").update([second])


def test_a_client_without_memory_writes_only_its_update(tmp_path: Path) -> None:
    setup = toy_setup(FULL)
    broadcasts_of(setup, 3, tmp_path)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.suffix == ".updates"
    assert file.name.startswith("r0003-")


def test_a_memory_is_kept_for_as_many_rounds_as_the_server_may_go_back(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL)
    broadcasts_of(setup, 5, tmp_path)
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "clients" / "000001").iterdir())
    assert names == ["r0003", "r0004", "r0005"]


def test_a_site_measures_the_seconds_of_reading_and_writing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(0.0)
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    setup = toy_setup(PARTIAL)
    first, _ = toy_server(setup).start_round()
    site = toy_site(setup, tmp_path)
    site.update([first])
    assert site.take_seconds() == 3  # it opens the round, stores the memory, then the update
    assert site.take_seconds() == 0


def test_updates_are_synced_to_disk_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, flushed = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(journal, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(journal.os, "fsync", lambda file: flushed.append(clock.now))
    box = journal.Journal(tmp_path / "updates")
    box.clear()  # of a federation without a message
    box.open_round(1)
    for client, clock.now in enumerate([100.0, 100.5, 100.9, 101.2, 102.0]):
        box.add(client, b"update", None)
    assert flushed == [100.0, 101.2]
    box.clear()
    assert not list((tmp_path / "updates").iterdir())


def test_bytes_that_are_no_message_are_refused() -> None:
    message = to_bytes(Update("toy", 1, 0, 2, 0.5, {}))
    assert from_bytes(message) == Update("toy", 1, 0, 2, 0.5, {})
    for content in (b"", message[:-1], b"x" * 100, pack({"kind": "Update"}, {}), pack({"kind": "print"}, {})):
        with pytest.raises(Damaged):
            from_bytes(content)
    assert unpack(pack({"a": [1, None, "ü"]}, {"g": {"x/y": torch.ones(2)}}))[0] == {"a": [1, None, "ü"]}


def test_an_optimizer_step_does_not_look_for_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[None] = []
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: looked.append(None) or -1)
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.Adam([weight], fused=True).step()
    assert not looked
