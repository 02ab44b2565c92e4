"""Mutated messages both ways: each is admitted and means what one may send, or is refused in one line."""

import copy
import io
import json
import math
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from admitted import METRICS, config, drawn, files
from hostile import Parts, Rich
from torch import Tensor
from toy import FULL, PARTIAL, federate, inline, toy_context, toy_server, toy_setup, toy_site

from fedlight.experiment.model_evaluation import check_scores
from fedlight.federation.admission import LARGEST, MOST_EXAMPLES
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.client import local_update
from fedlight.federation.codec import Codec
from fedlight.federation.messages import (
    Broadcast,
    Evaluation,
    Payload,
    Scores,
    Update,
    from_bytes,
    to_bytes,
)
from fedlight.federation.server import Server
from fedlight.federation.transforms.huffman import Huffman
from fedlight.federation.transforms.lowrank import LowRank
from fedlight.federation.transforms.quantisation import Quantisation
from fedlight.federation.transforms.rounding import Rounding
from fedlight.federation.transforms.sign import Sign
from fedlight.federation.transforms.topk import TopK
from fedlight.federation.transport.transport import Deployment
from fedlight.runtime.errors import Damaged, Diverged
from fedlight.runtime.printable import printable

pytest.importorskip("flwr")

from fedlight.deployment.institution import Institution
from fedlight.deployment.terms import Terms
from fedlight.federation.transport.envelope import CLIENT, HASH, PROBLEM, wrap
from fedlight.federation.transport.flower import Flower

MESSAGES = 10_000
FEW = 400
TRAINED = 6  # admitted broadcasts that are answered by a real local update
PEAK = 100  # MiB for one message
LONGEST = 3.0  # seconds of processor time for one message

CHAINS: dict[str, dict[str, Any]] = {
    "values": {},
    "variates": {"algorithm": Scaffold()},
    "sparse": {"codec": Codec(up=[TopK(0.1), Quantisation(4), Huffman()])},
    "mask": {"codec": Codec(up=[TopK(0.5)], down=[TopK(0.5)], seeded_start=True)},
    "rounded": {"codec": Codec(up=[Rounding(0.5), Huffman()], down=[Rounding(0.5), Huffman()])},
    "signs": {"codec": Codec(up=[Sign()], down=[Quantisation(2)])},
    "ranks": {"codec": Codec(up=[LowRank(1), Quantisation(8)], down=[LowRank(2), Huffman()])},
}


# --- what is mutated


@dataclass(frozen=True)
class Case:
    """A federation of two clients before its third round, and what honest parties send in it."""

    server: Server
    node: Institution
    sent: Broadcast
    request: Evaluation
    broadcast: bytes
    evaluation: bytes
    update: bytes
    other: Update
    scores: bytes


@cache
def case(name: str) -> Case:
    method = FULL.model_copy(update={"evaluate": "clients"}) if name == "ranks" else PARTIAL
    setup = toy_setup(method, module=Rich(), epochs=1, **CHAINS[name])
    folder = Path(mkdtemp(prefix="hostile-"))
    server, site = toy_server(setup), toy_site(setup, folder)
    for _ in federate(server, inline(site), 2):
        pass
    (evaluation,) = server.evaluations([1], draw=True)
    others, broadcast = server.start_round()
    memory = {client: site.memory.read(client, 2) for client in (0, 1)} if setup.keeps_memory else {}
    other, update = (
        local_update(sent, memory.get(sent.client, {}), setup)[0] for sent in (others, broadcast)
    )
    assert other
    assert update
    grid = {"images": torch.zeros(2, *cell().data.shape, dtype=torch.uint8)}
    scores = to_bytes(drawn(METRICS, grid=grid))
    terms = Terms(
        setup.method, tuple(setup.slices.names), 10, server.participation, draws_after=lambda round_: True
    )
    node = Institution("toy", 1, site, folder, terms)
    sent = to_bytes(broadcast), to_bytes(evaluation)
    return Case(server, node, broadcast, evaluation, *sent, to_bytes(update), other, scores)


@cache
def cell() -> Any:
    return config("evaluation.samples=70", "evaluation.grid=2")


def flower(server: Server) -> Flower:
    """The server's side of the transport, which reads replies."""
    site = case("values").node.site
    scored = partial(check_scores, config=cell())
    deployment = Deployment(grid=None, agreed="")
    context = toy_context(site, server=server, check_scores=scored, deployment=deployment)
    return Flower(context, timeout=1.0)


# --- mutations

INTEGERS = [-1, 0, 1, 2, 3, 4, 5, 255, 256, 2**31, 2**40, 2**53, 2**63, 2**64, 10**300, -(2**63)]
FLOATS = [0.0, -0.0, 1.5, 1e30, -1e30, 1.7e308, math.inf, -math.inf, math.nan, 5e-324]
TEXTS = [
    "",
    "toy",
    "own",
    "shared",
    "algorithm",
    "\n\x1b[2J",
    "\ud800",
    "x" * 3000,
    "/",
    "a/b",
    "F32",
    "Update",
]
LEAVES = [*INTEGERS, *FLOATS, *TEXTS, None, True, False]
VALUES = [*LEAVES, [], {}, [[]], [0], {"own": 1}, {"": 0}, ["shared", "shared"], [["[" * 50]], [0] * 5000]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "BOOL", "C64", "F8_E4M3"]
NUMBERS = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e19, 1e18, 0.0, 1.0, -1.0, 1e-40]
TENSORS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def paths(node: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside a JSON value."""
    yield here
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield from paths(value, (*here, key))


def put(root: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    inner = root
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return root


def drop(root: Any, path: tuple[Any, ...]) -> Any:
    inner = root
    for key in path[:-1]:
        inner = inner[key]
    if path:
        del inner[path[-1]]
    return root


def change_json(random: Random, root: Any, values: list[Any]) -> Any:
    """A value inside is replaced, taken away, added or renamed."""
    path = random.choice(list(paths(root)))
    how = random.choice(["put", "put", "put", "drop", "add", "rename"])
    value = copy.deepcopy(random.choice(values))
    if how == "put":
        return put(root, path, value)
    if how == "drop":
        return drop(root, path)
    if isinstance(root, dict):
        name = random.choice([*TEXTS, *map(str, root)])
        old = random.choice([*root, ""])
        root[name] = root.pop(old) if how == "rename" and old in root else value
    return root


def change_tensor(random: Random, payloads: dict[str, Payload]) -> None:
    """A tensor gets other numbers, another dtype, shape or name, or is taken away."""
    slices = [name for name, payload in payloads.items() if payload.tensors]
    if not slices:
        return
    slice_ = random.choice(slices)
    tensors = dict(payloads[slice_].tensors)
    name = random.choice(sorted(tensors))  # which safetensors gives in any order
    tensor = tensors[name].clone()
    flat = tensor.flatten()
    how = random.choice(
        ["number", "number", "bytes", "bytes", "dtype", "shape", "longer", "rename", "drop", "deflate"]
    )
    if how == "number" and len(flat):
        where = random.randint(0, len(flat) - 1)
        value = random.choice(NUMBERS if tensor.is_floating_point() else [0, 1, 2, 127, 100])
        flat[where] = value
        tensor = flat.view(tensor.shape)
    elif how == "bytes" and len(flat):
        raw = bytearray(flat.view(torch.uint8).numpy().tobytes())
        for _ in range(random.randint(1, 4)):
            raw[random.randint(0, len(raw) - 1)] = random.randint(0, 255)
        if tensor.dtype is not torch.bool:
            tensor = torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
    elif how == "dtype":
        tensor = tensor.to(random.choice(TENSORS))
    elif how == "shape":
        tensor = random.choice([flat, flat[:-1], tensor[None], flat[:0]])
    elif how == "longer":
        tensor = torch.cat([flat, flat, flat])
    elif how == "deflate":
        tensor = torch.tensor(list(random.choice(bombs())), dtype=torch.uint8)
    tensors[name] = tensor
    if how == "rename":
        names = ["", "own.bias", "shared.bias", "delta/", "delta/000003", "delta/000001", "delta/x", "\n"]
        tensors[random.choice(names)] = tensors.pop(name)
    elif how == "drop":
        del tensors[name]
    payloads[slice_] = Payload(tensors, payloads[slice_].params)


@cache
def bombs() -> list[bytes]:
    """Deflated zeros, far more than anybody expects, and what is no deflate stream."""
    import zlib

    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return [
        deflate.compress(bytes(2**24)) + deflate.flush(),
        Huffman().compress(bytes(2**12)),
        b"\xff" * 64,
        b"",
    ]


def change_payloads(random: Random, payloads: dict[str, Payload]) -> None:
    """A payload is taken away, copied to another name, or counted otherwise."""
    name = random.choice([*payloads, "own"])
    how = random.choice(["drop", "copy", "count", "empty"])
    payload = payloads.get(name, Payload({}, 0))
    if how == "drop":
        payloads.pop(name, None)
    elif how == "copy":
        payloads[random.choice(["own", "shared", "algorithm", "x", "a b\n"])] = payload
    elif how == "count":
        payloads[name] = Payload(payload.tensors, random.choice([0, 1, 5, 2**39]))
    else:
        payloads[name] = Payload({}, payload.params)


def change_bytes(random: Random, content: bytes) -> bytes:
    """Bytes are flipped, cut, doubled or put in, in the header more often than elsewhere."""
    raw = bytearray(content)
    for _ in range(random.randint(1, 4)):
        if not raw:
            break
        end = len(raw) - 1 if random.random() < 0.5 else min(len(raw) - 1, 400)
        where = random.randint(0, end)
        how = random.choice(["flip", "set", "cut", "insert", "double", "length"])
        if how == "flip":
            raw[where] ^= 1 << random.randint(0, 7)
        elif how == "set":
            raw[where] = random.choice([*b'"[]{}:,\\019eE-\n\0', 255])
        elif how == "cut":
            del raw[where : where + random.randint(1, 50)]
        elif how == "insert":
            raw[where:where] = random.choice([b"[" * 2000, b"{", b"\0" * 9, b'"a":1,', b"\xff"])
        elif how == "double":
            raw += raw[where:]
        else:
            raw[:8] = struct.pack("<Q", random.choice([0, 1, 2**21, 2**63, len(raw), len(raw) - 8]))
    return bytes(raw)


def mutate(random: Random, honest: bytes) -> bytes:
    message = from_bytes(honest)
    payloads = dict(message.payloads)
    for _ in range(random.choice([0, 1, 1, 2])):
        random.choice([change_tensor, change_tensor, change_payloads])(random, payloads)
    content = to_bytes(replace(message, payloads=payloads))
    how = random.choice(["none", "header", "header", "entries", "bytes", "huge"])
    if how in ("header", "entries", "huge"):
        parts = Parts.of(content)
        if how == "header":
            parts.header = change_json(random, parts.header, VALUES)
        elif how == "entries":
            parts.tensors = change_json(random, parts.tensors, [*VALUES, *DTYPES])
        elif random.randint(0, 60) == 0:  # as large as a header may be, and larger
            size = random.choice([100_000, 700_000, 1_300_000])
            many = random.choice([[[]], ["a"], [0], [{"a": 0}]]) * size
            params = {str(number): 0 for number in range(size // 10)}
            parts.header |= random.choice([{"more": many}, {"uplink": many}, {"params": params}])
        with suppress(TypeError):  # the entries are no object any more
            content = parts.to_bytes()
    return change_bytes(random, content) if how == "bytes" else content


# --- who reads them


def memory() -> Counter[str]:
    """Sizes of this process as Linux knows them, in MiB: `VmRSS` now, `VmHWM` at most since `begin_peak`."""
    with suppress(FileNotFoundError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return Counter(
            {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}
        )
    return Counter()


def begin_peak() -> float:
    """Begins a new peak; returns the memory that this process has."""
    with suppress(FileNotFoundError, PermissionError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory()["VmRSS"]


@dataclass
class Tally:
    """What became of the messages.

    Attributes:
        outcomes: how many of each.
        longest: seconds of processor time for one of them.
        peak: MiB of memory that one of them took for a moment, where Linux says it.
        admitted: those that were answered.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    peak: float = 0.0
    admitted: set[bytes] = field(default_factory=set)

    def time(self, read: Callable[[], Any]) -> Any:
        before = begin_peak()
        begun = time.process_time()
        try:
            return read()
        finally:
            self.longest = max(self.longest, time.process_time() - begun)
            self.peak = max(self.peak, memory()["VmHWM"] - before)


def state_of(server: Server) -> Any:
    """All of a server that a message might touch."""
    tensors = {**server.theta, **{f"state/{name}": tensor for name, tensor in server.state.items()}}
    return (
        {name: tensor.clone() for name, tensor in tensors.items()},
        dict(server.met),
        [*server.ledger._open],
        [*server.ledger.entries],
        {*server._open.waiting},
    )


def same(one: Any, other: Any) -> bool:
    return one[1:] == other[1:] and all(
        torch.equal(tensor, other[0][name]) for name, tensor in one[0].items()
    )


def reasonable(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> bool:
    """Whether tensors have the names, shapes and dtypes of others, and numbers that can be added up."""
    return tensors.keys() == like.keys() and all(
        tensor.shape == like[name].shape
        and tensor.dtype == like[name].dtype
        and bool((tensor.double().abs() <= 2 * LARGEST).all())
        for name, tensor in tensors.items()
    )


def server_reads(content: bytes, name: str, kind: str, words: dict[str, Any], tally: Tally) -> None:
    """A reply to a broadcast or an evaluation, as Flower brings it."""
    made = case(name)
    before, transport, errors = state_of(made.server), flower(made.server), io.StringIO()
    reply = SimpleNamespace(content=wrap(content, words), has_content=lambda: True)
    with redirect_stderr(errors):
        if kind == "update":
            admitted = tally.time(lambda: transport._read_update(made.sent, reply))
        else:
            admitted = tally.time(lambda: transport._read_scores(made.request, reply))
    assert same(before, state_of(made.server))
    error_line = errors.getvalue()
    if admitted is None:
        assert error_line.startswith("fedlight: client 1 ")
        assert error_line.count("\n") == 1
        assert error_line[:-1].isprintable()
        assert len(error_line) < 500
        tally.outcomes[f"{kind} refused"] += 1
        return
    assert error_line == ""
    tally.outcomes[f"{kind} admitted"] += 1
    if kind == "update":
        close_with(admitted, made)
    else:
        check_admitted_scores(admitted)


def close_with(update: Update, made: Case) -> None:
    """An admitted update is a term of a finite mean, and what the server stores is JSON."""
    assert (update.cell, update.round, update.client) == ("toy", 3, 1)
    assert 1 <= update.num_examples <= MOST_EXAMPLES
    server = copy.deepcopy(made.server)
    values, _ = server.decode(update)
    assert reasonable(values, {name: server.theta[name] for name in values})
    assert {*values} == {name for slice_ in made.sent.uplink for name in server.slices.names[slice_]}
    for received in (made.other, update):
        server.receive(received)
    outcome = server.finish_round()
    assert outcome.reports == 2
    counted = {
        entry.slice: entry.params
        for entry in outcome.exchange
        if (entry.client, entry.direction) == (1, "up")
    }
    expected = {slice_: server.slice_params()[slice_] for slice_ in made.sent.uplink}
    assert counted.items() >= expected.items()
    json.dumps([outcome.train_loss, outcome.client_losses, server.ledger.rows()], allow_nan=False)
    assert all(tensor.isfinite().all() for tensor in server.theta.values())


def check_admitted_scores(scores: Scores) -> None:
    assert scores.client == 1
    assert len(bytes.fromhex(scores.sha256)) == 32
    assert {*METRICS} <= {*scores.metrics}
    json.dumps({name: float(np.std([value, 0.0])) for name, value in scores.metrics.items()}, allow_nan=False)
    images = scores.payloads["grid"].tensors["images"]
    assert (images.dtype, images.shape) == (torch.uint8, (2, *cell().data.shape))


def node_reads(content: bytes, name: str, kind: str, tally: Tally) -> None:
    """A message from the server, at an institution."""
    node = case(name).node
    before = files(node.folder)
    try:
        message = tally.time(lambda: node.read(content))
    except Damaged as error:
        error_line = printable(error)
        assert error_line.isprintable()
        assert len(error_line) <= 300
        tally.outcomes[f"{kind} refused at a node"] += 1
        return
    finally:
        assert files(node.folder) == before
    tally.outcomes[f"{kind} admitted at a node"] += 1
    setup = node.site.setup
    assert (message.cell, message.client) == ("toy", 1)
    for slice_, payload in message.payloads.items():
        if slice_ != "algorithm":
            held = setup.slices.select([slice_], setup.first)
            assert reasonable(setup.codec.down.values(payload, held), held)
    if isinstance(message, Broadcast):
        assert 0 <= message.previous < message.round
        assert {*message.uplink} <= {*setup.method.uplink}
        assert not message.drops_out
    answered = sum(count for outcome, count in tally.outcomes.items() if outcome.startswith("answer"))
    if answered < TRAINED and content not in tally.admitted:
        tally.admitted.add(content)
        tally.outcomes[f"answer to {kind}: {answer(node, content)}"] += 1


def answer(node: Institution, content: bytes) -> str:
    """What the institution does with a message that it admits, with a copy of its memory."""
    folder = Path(mkdtemp(prefix="hostile-")) / "copy"
    shutil.copytree(node.folder, folder)
    try:
        found = Institution("toy", 1, toy_site(node.site.setup, folder), folder, node.terms).answer(content)
    except (Damaged, Diverged) as error:  # a memory of that round is not there; absurd weights
        return type(error).__name__
    finally:
        shutil.rmtree(folder.parent)
    return type(from_bytes(found)).__name__


WORDS: list[dict[str, Any]] = [{CLIENT: 1, HASH: "0" * 64}] * 12 + [
    {},
    {CLIENT: -1},
    {CLIENT: "1"},
    {"more": [1, 2]},
    {PROBLEM: "failed"},
    {PROBLEM: "a\nb\x1b[2J" * 1000},
    {PROBLEM: 7},
]


def try_messages(count: int) -> Tally:
    """Message n is made from the seed n."""
    tally = Tally()
    for number in range(count):
        try:
            try_message(Random(number), tally)
        except Exception:
            print(f"seed {number}")
            raise
    return tally


def try_message(random: Random, tally: Tally) -> None:
    name = random.choice([*CHAINS])
    made = case(name)
    kind = random.choice(["update", "update", "scores", "broadcast", "broadcast", "evaluation"])
    honest = getattr(made, kind)
    if kind in ("update", "scores"):
        words = random.choice(WORDS)
        server_reads(mutate(random, honest), name, kind, words, tally)
    else:
        node_reads(mutate(random, honest), name, kind, tally)


@pytest.fixture
def honest_parties() -> Iterator[None]:
    """The federations, and no file of theirs afterwards."""
    for name in CHAINS:
        made = case(name)
        tally = Tally()
        server_reads(made.update, name, "update", {CLIENT: 1}, tally)
        server_reads(made.scores, name, "scores", {CLIENT: 1}, tally)
        node_reads(made.broadcast, name, "broadcast", tally)
        node_reads(made.evaluation, name, "evaluation", tally)
        assert tally.outcomes == {
            "update admitted": 1,
            "scores admitted": 1,
            "broadcast admitted at a node": 1,
            "evaluation admitted at a node": 1,
            "answer to broadcast: Update": 1,
            "answer to evaluation: Scores": 1,
        }
    yield
    for name in CHAINS:
        shutil.rmtree(case(name).node.folder)
    case.cache_clear()


UPDATE = to_bytes(Update("toy", 1, 0, 2, 0.5, {}))
LARGE: dict[str, Callable[[Parts], Any]] = {
    "lists": lambda parts: parts.header.update(more=[[]] * 10**6),
    "texts": lambda parts: parts.header.update(more=["a"] * 500_000),
    "numbers": lambda parts: parts.header.update(more=[0] * 1_300_000),
    "uplink": lambda parts: parts.header.update(uplink=[0] * 1_300_000, kind="Broadcast"),
    "params": lambda parts: parts.header.update(params={str(number): -1 for number in range(200_000)}),
    "digits": lambda parts: parts.header.update(num_examples=10**4000),
    "shape": lambda parts: parts.tensors.update(
        x={"dtype": "F32", "shape": ["x"] * 800_000, "data_offsets": [0, 0]}
    ),
    "entries": lambda parts: parts.tensors.update(
        {str(number): {"dtype": "x", "shape": [-1], "data_offsets": [0, 0]} for number in range(16_000)}
    ),
}


@pytest.mark.parametrize("large", LARGE)
def test_the_largest_header_takes_little_time_and_memory(large: str) -> None:
    parts, tally = Parts.of(UPDATE), Tally()
    LARGE[large](parts)
    content = parts.to_bytes()
    with pytest.raises(Damaged):
        tally.time(lambda: from_bytes(content))
    assert tally.longest < 1
    assert tally.peak < 100


@pytest.mark.parametrize("number", [FEW, pytest.param(MESSAGES, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("honest_parties")
def test_a_mutated_message_is_admissible_or_refused_in_one_line(
    number: int, record_property: Callable[[str, object], None]
) -> None:
    tally = try_messages(number)
    figures = f"{dict(tally.outcomes)}, peak {tally.peak:.0f} MiB, longest {tally.longest:.3f} s"
    print(figures)
    record_property("hostile messages", figures)
    read = {name: count for name, count in tally.outcomes.items() if not name.startswith("answer")}
    assert sum(read.values()) >= number
    assert len(read) == 8, "updates, scores, broadcasts and evaluations are both admitted and refused"
    assert tally.peak < PEAK
    assert tally.longest < LONGEST
