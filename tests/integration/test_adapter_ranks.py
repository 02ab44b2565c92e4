"""Cells whose clients have adapters of different ranks: what they train, send and keep; the mean."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Cell, Wire, invoke
from diffusers import DDPMScheduler
from killed import run_killed
from omegaconf import OmegaConf
from pretrained import tiny_unet
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Adam

from fedlight.config import validate
from fedlight.diffusion.ddpm import DDPM
from fedlight.experiment.estimate import estimate
from fedlight.experiment.finished import open_cell
from fedlight.experiment.setup import make_cell_server
from fedlight.experiment.trial import check
from fedlight.federation.admission import check_broadcast
from fedlight.federation.client_ranks import ClientRanks, RankLimit
from fedlight.federation.messages import Payload, State, Update
from fedlight.federation.server import Server
from fedlight.finetuning.adapters import add_adapters, rank_dimensions
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.runs.identity import read_config
from fedlight.runtime.errors import Damaged

MakeCell = Callable[..., Cell]
RANKS = (1, 3, 2)
LORA = (
    "finetuning=lora", "finetuning.rank=[1,3,2]", "finetuning.targets=[attention,convolutions]", "clients=3",
    "transport=inline",
)  # fmt: skip


def ranks_of(tensors: State) -> set[int]:
    """The ranks of factors."""
    return {tensors[name].shape[dim] for name, dim in rank_dimensions(tensors).items()}


def merged(payloads: dict[str, Payload]) -> State:
    return {name: tensor for payload in payloads.values() for name, tensor in payload.tensors.items()}


def padded(tensor: Tensor, dim: int, rank: int = max(RANKS)) -> Tensor:
    result = torch.zeros(*tensor.shape[:dim], rank, *tensor.shape[dim + 1 :])
    result.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return result


@pytest.mark.parametrize("train", ["both", "b"])
def test_a_client_trains_an_adapter_of_its_own_rank(train: str) -> None:
    """A model of rank 3 that is limited to 1 trains as one of rank 1 with the same factors does."""
    large, small = tiny_unet(), tiny_unet()
    modules = []
    for unet, rank in ((large, 3), (small, 1)):
        config = FinetuningConfig(name="lora", pretrained=None, sha256=None, rank=rank, train=train)
        frozen = add_adapters(unet, config, seed=0)
        slices = {"all": [name for name, _ in unet.named_children()]}
        schedule = DDPMScheduler(num_train_timesteps=20)
        modules.append(DDPM(unet, schedule, "mse", partial(Adam, lr=1e-2), slices, frozen=frozen))
    limited, alone = modules
    ranks = ClientRanks((1, 3), rank_dimensions(limited.state_dict()))
    dims = rank_dimensions(name for name, _ in limited.named_parameters())
    start = {name: p.detach() for name, p in limited.named_parameters()}
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            if name in dims:
                parameter.copy_(start[name].narrow(dims[name], 0, 1))
    limited.load_state_dict(ranks.clear(0, limited.state_dict()))
    limit = RankLimit(ranks, [0])
    nothing: Any = None
    limit.on_fit_start(nothing, limited)
    generator = torch.Generator().manual_seed(1)
    optimizers = [module.configure_optimizers() for module in modules]
    for _ in range(3):
        x_0, eps = torch.randn(2, 4, 1, 8, 8, generator=generator).unbind()
        for module, optimizer in zip(modules, optimizers, strict=True):
            optimizer.zero_grad()
            module.loss_of({"x_0": x_0, "t": torch.arange(4) + 2, "eps": eps}).backward()
            if module is limited:
                limit.on_before_optimizer_step(nothing, limited, optimizer)
            optimizer.step()
    expected = alone.state_dict()
    before = ranks.cut(0, {name: start[name] for name in limited.state_dict()})
    assert any(not torch.equal(before[name], expected[name]) for name in expected)
    for name, tensor in limited.state_dict().items():
        torch.testing.assert_close(tensor, padded(expected[name], dims[name]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("UDEC", ("algorithm=scaffold",)),
        pytest.param("FULL", ("algorithm=localadam", "finetuning.train=b"), marks=pytest.mark.slow),
        pytest.param("FULL", ("transform=best",), marks=pytest.mark.slow),
        pytest.param("USPLIT", ("privacy=example",), marks=pytest.mark.slow),
    ],
)
def test_a_client_sends_and_keeps_its_own_rank_and_the_ledger_counts_it(
    cell: MakeCell, wire: Wire, pretrained: str, method: str, extra: tuple[str, ...]
) -> None:
    made = cell(*LORA, pretrained, f"method={method}", *extra, "rounds=3", "fraction=0.67")
    assert {update.client for update in wire.updates} == {0, 1, 2}
    encoded = "transform=best" in extra
    params: dict[int, set[int]] = {client: set() for client in range(3)}
    for message in (*wire.updates, *wire.broadcasts):
        down = not isinstance(message, Update)
        expected = max(RANKS) if down and encoded else RANKS[message.client]
        for name, payload in message.payloads.items():
            plain = {
                key.split("/")[-1]: tensor for key, tensor in payload.tensors.items() if tensor.dim() > 1
            }
            assert ranks_of(plain) <= {expected}, name
            if not down and name == "decoder":
                params[message.client].add(payload.params)
    counts = {client: count for client, (count,) in params.items()}
    assert counts[1] == 3 * counts[0] == 1.5 * counts[2]

    rows = made.rows("ledger.csv")
    assert sum(int(row["bytes"]) for row in rows) == made.result["exchange"]["bytes_total"]
    crossed = [
        (m.round, m.client, direction, name, payload.params, sum(t.nbytes for t in payload.tensors.values()))
        for direction, messages in (("down", wire.broadcasts), ("up", wire.updates))
        for m in messages
        for name, payload in m.payloads.items()
    ]
    columns = ("round", "client", "direction", "slice", "params", "bytes")
    counted = [tuple(row[c] if not row[c].isdigit() else int(row[c]) for c in columns) for row in rows]
    assert sorted(crossed) == sorted(counted)

    server = open_cell(made.folder).server
    for client, rank in enumerate(RANKS):
        for path in (made.folder / "checkpoint" / "clients" / f"{client:06d}").glob("*"):
            kept = load_file(path)
            for group in ("model", "errors"):
                own = {n.removeprefix(f"{group}/"): t for n, t in kept.items() if n.startswith(f"{group}/")}
                assert ranks_of(own) <= {rank}
    assert ranks_of(server.theta) == {3}
    if method == "UDEC":
        for client, rank in enumerate(RANKS):
            state = open_cell(made.folder).state(client)
            for name, dim in rank_dimensions(state).items():
                assert not state[name].narrow(dim, rank, 3 - rank).any()
                assert ".lora_B." in name or state[name].narrow(dim, 0, rank).any()


def test_the_bytes_of_a_cell_are_estimated(cell: MakeCell, pretrained: str) -> None:
    made = cell(*LORA, pretrained, "method=UDEC", "rounds=2", "fraction=0.67")
    config = validate(OmegaConf.create(read_config(made.folder / "config.yaml")))
    parts = check(config, elsewhere=False)
    assert parts is not None
    assert estimate(parts).bytes == made.result["exchange"]["bytes_total"]


def test_the_mean_is_over_padded_factors(cell: MakeCell, wire: Wire, pretrained: str) -> None:
    made = cell(*LORA, pretrained, "rounds=1")
    sizes = made.sizes
    theta = open_cell(made.folder).server.theta
    updates = {update.client: merged(update.payloads) for update in wire.updates}
    for name, dim in rank_dimensions(theta).items():
        summands = [sizes[client] * padded(updates[client][name], dim).double() for client in range(3)]
        torch.testing.assert_close(theta[name], (sum(summands) / sum(sizes)).float())


@pytest.mark.parametrize("ranks", [RANKS, (3, 3, 3)])
def test_flexlora_averages_the_products_of_all_ranks(
    cell: MakeCell, wire: Wire, pretrained: str, ranks: tuple[int, ...]
) -> None:
    rank = "3" if ranks == (3, 3, 3) else "[1,3,2]"
    made = cell(*LORA, pretrained, f"finetuning.rank={rank}", "algorithm=flexlora", "rounds=2")
    sizes, theta = made.sizes, open_cell(made.folder).server.theta
    updates = {update.client: merged(update.payloads) for update in wire.updates if update.round == 2}
    firsts = [name for name in theta if ".lora_A." in name]
    assert firsts
    for first in firsts:
        second = first.replace(".lora_A.", ".lora_B.")
        products = [
            sizes[client] * (own[second].double().flatten(1) @ own[first].double().flatten(1))
            for client, own in updates.items()
        ]
        expected: Tensor = sum(products) / sum(sizes)  # type: ignore[assignment]
        left, values, right = torch.linalg.svd(expected, full_matrices=False)
        a, b = (theta[name].double().flatten(1) for name in (first, second))
        for rank in ranks:  # each client has the best of its rank
            best = (left[:, :rank] * values[:rank]) @ right[:rank]
            torch.testing.assert_close(b[:, :rank] @ a[:rank], best, rtol=1e-4, atol=1e-6)
    for broadcast in (broadcast for broadcast in wire.broadcasts if broadcast.round == 2):
        assert ranks_of(merged(broadcast.payloads)) == {ranks[broadcast.client]}


@pytest.mark.parametrize("algorithm", ["none", "flexlora"])
def test_rows_that_no_client_of_a_round_has_can_be_trained_later(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, pretrained: str, algorithm: str
) -> None:
    """Rows of zeros in A and in B would have no gradient from then on."""
    states: list[tuple[set[int], State, State]] = []
    finish = Server.finish_round

    def recorded(server: Server) -> Any:
        before = server.theta
        outcome = finish(server)
        states.append((set(outcome.num_examples), before, server.theta))
        return outcome

    monkeypatch.setattr(Server, "finish_round", recorded)
    cell(*LORA, pretrained, "rounds=4", "fraction=0.3", f"algorithm={algorithm}")
    highest = [max(RANKS[client] for client in clients) for clients, _, _ in states]
    assert min(highest) < 3
    for rank, (_, before, after) in zip(highest, states, strict=True):
        for name, dim in rank_dimensions(after).items():
            rest = [state[name].narrow(dim, rank, 3 - rank) for state in (before, after)]
            assert torch.equal(*rest) or algorithm == "flexlora"
            assert ".lora_B." in name or rank == 3 or rest[1].any()


@pytest.mark.parametrize("extra", [("method=UDEC", "algorithm=flexlora", "transform=best")])
def test_a_cell_that_is_killed_goes_on_to_the_same_bits(
    cell: MakeCell, pretrained: str, extra: tuple[str, ...]
) -> None:
    arguments = [*LORA, pretrained, "rounds=3", *extra]
    expected = cell(*arguments).digest
    run_killed(["name=killed", *arguments], stored=5)  # client 1 of round 2 was the last
    assert invoke(*SMALL, "name=killed", *arguments) == 0
    (folder,) = Path("runs/killed").glob("*")
    assert Cell(folder).digest == expected


def test_messages_of_another_rank_are_refused(cell: MakeCell, wire: Wire, pretrained: str) -> None:
    made = cell(*LORA, pretrained, "rounds=2")
    config = validate(OmegaConf.create(read_config(made.folder / "config.yaml")))
    parts = check(config, elsewhere=False)
    assert parts is not None
    server = make_cell_server(made.folder.name, parts)
    server.start_round()
    first, second = (next(u for u in wire.updates if (u.round, u.client) == (1, c)) for c in (0, 1))
    slices = tuple(parts.slices.names)
    server.admit(first, slices)
    for client, update in ((1, first), (0, second)):
        with pytest.raises(Damaged, match=r"instead of|states"):
            server.admit(replace(update, client=client), slices)

    own = parts.ranks.cut(0, parts.model.state_dict())
    for client in (0, 1):
        broadcast = next(b for b in wire.broadcasts if (b.round, b.client) == (2, client))
        arguments = (own, parts.slices, parts.method, parts.codec, parts.algorithm)
        if client == 0:
            check_broadcast(broadcast, *arguments)
            continue
        with pytest.raises(Damaged, match=r"instead of|states"):
            check_broadcast(broadcast, *arguments)


@pytest.mark.slow
def test_fused_clients_have_their_own_ranks(cell: MakeCell, wire: Wire, pretrained: str) -> None:
    """Of different sizes, so that some leave the others before they are done."""
    arguments = (*LORA, pretrained, "rounds=1", "partition=quantity_skew", "data.batch_size=4")
    cell(*arguments)
    alone = {update.client: merged(update.payloads) for update in wire.updates}
    wire.updates.clear()
    cell(*arguments, "trainer.fuse=3")
    for update in wire.updates:
        own = merged(update.payloads)
        assert ranks_of(own) == {RANKS[update.client]}
        for name, tensor in alone[update.client].items():
            torch.testing.assert_close(own[name], tensor, rtol=1e-2, atol=1e-4)


def test_the_rank_of_clients_is_in_the_id_and_one_number_is_as_before(
    command: Callable[..., int], pretrained: str, tmp_path: Path
) -> None:
    lora = [*SMALL, "rounds=0", "clients=2", "name=ids", "finetuning=lora", pretrained]
    for rank in ("2", "[2,2]", "[1,2]"):
        assert command(*lora, f"finetuning.rank={rank}") == 0
    assert len(list(tmp_path.glob("runs/ids/*/result.json"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetuning.rank=[1,2]"], "[1,2] has 2 ranks, and clients=3: give one rank for each client"),
        (["aggregation=secure"], "needs aggregation=none: secure aggregation adds up vectors of equal"),
        (["privacy=client"], "needs privacy=example or none: the size of an update would reveal"),
        (["algorithm=fednova"], "needs another algorithm than fednova"),
        (["method=CENTRAL"], "needs a method whose clients train: method=CENTRAL trains one model"),
        (["finetuning.rank=[1,0,2]"], "finetuning.rank must be"),
        (["finetuning.rank=[]"], "finetuning.rank must be"),
    ],
)
def test_what_does_not_compose_is_one_line(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    pretrained: str,
    arguments: list[str],
    message: str,
) -> None:
    assert command(*SMALL, *LORA, pretrained, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in line
