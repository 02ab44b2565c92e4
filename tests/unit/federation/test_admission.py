"""Messages from parties that nobody vouches for: a bad one costs its node a turn, and has no other effect."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from admitted import METRICS, config, drawn, files
from conftest import Cell
from hostile import Parts, Rich, assemble
from torch import Tensor
from toy import FULL, PARTIAL, federate, toy_setup

from fedlight.deployment.relay import LONGEST_SOCKET, socket_path
from fedlight.experiment.model_evaluation import check_scores
from fedlight.federation.admission import LARGEST, MOST_EXAMPLES, check_evaluation, check_update
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.codec import Chain, Codec
from fedlight.federation.messages import (
    Broadcast,
    Evaluation,
    Payload,
    Scores,
    Update,
    from_bytes,
    to_bytes,
)
from fedlight.federation.slices import SliceMap
from fedlight.federation.transforms.topk import TopK
from fedlight.federation.transport.processes import Processes
from fedlight.runtime.errors import Damaged
from fedlight.runtime.printable import printable

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from grid import Toys

from fedlight.deployment import relay, resident
from fedlight.federation.transport.envelope import (
    BYTES,
    CLIENT,
    HASH,
    PROBLEM,
    WORDS,
    open_bytes,
    open_words,
    wrap,
)

BIAS = "shared.bias"

MakeToys = Callable[..., Toys]


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeToys:
    return lambda setup, name="toys", **terms: Toys(setup, tmp_path / name, monkeypatch, **terms)


def stored(over: Toys, folder: Path) -> str:
    """The hash of all that a server stores after a round."""
    folder.mkdir()
    over.server.save(ServerCheckpoint(folder, "toy"), {})
    (path,) = folder.iterdir()
    return path.name


def after_round_two(
    over: Toys, folder: Path, act: Callable[[Callable[[bytes], bytes], bytes], bytes] | None
) -> tuple[str, float | None]:
    """What is stored, and the loss, after a second round in which node 12 does as `act` says, or fails."""
    over.run(1)
    node = over.grid.nodes[12]
    good = node.act
    if act is None:
        node.problem = "failed"
    else:
        node.act = lambda content: act(good, content)
    (done,) = federate(over.server, over.transport, 2)
    return stored(over, folder), done.train_loss


def tensor(update: Update, **tensors: Tensor) -> Update:
    shared = update.payloads["shared"]
    return replace(
        update, payloads={**update.payloads, "shared": Payload({**shared.tensors, **tensors}, shared.params)}
    )


def aux(update: Update, params: Any) -> Update:
    payload = update.payloads["algorithm"]
    return replace(update, payloads={**update.payloads, "algorithm": Payload(payload.tensors, params)})


def header(content: bytes, **fields: Any) -> bytes:
    parts = Parts.of(content)
    return Parts(parts.tensors, parts.header | fields, parts.body).to_bytes()


def stray(content: bytes) -> bytes:
    """With a tensor of no payload."""
    parts = Parts.of(content)
    end = len(parts.body)
    parts.tensors["other/x"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    return Parts(parts.tensors, parts.header, parts.body + b"\0" * 4).to_bytes()


def repeated(content: bytes) -> bytes:
    parts = Parts.of(content)
    return assemble(json.dumps(parts.header)[:-1] + ', "client": 1}', parts.tensors, parts.body)


CHANGES: dict[str, Callable[[Update], Update]] = {
    "10**300 images": lambda u: replace(u, num_examples=10**300),
    "2**63 images": lambda u: replace(u, num_examples=2**63),
    "a weight above all others": lambda u: replace(u, num_examples=MOST_EXAMPLES + 1),
    "no image": lambda u: replace(u, num_examples=0),
    "a loss that overflows": lambda u: replace(u, loss=1.7e308),
    "a value that overflows": lambda u: tensor(u, **{BIAS: torch.tensor([3e38])}),
    "auxiliary params in words": lambda u: aux(u, "many"),
    "negative auxiliary params": lambda u: aux(u, -(10**9)),
    "false auxiliary params": lambda u: aux(u, 10**9),
    "a changed table": lambda u: tensor(u, **{"shared.more.table": torch.tensor([0, 0, 0])}),
    "a counter at its end": lambda u: tensor(u, **{"shared.more.count": torch.tensor(2**63 - 1)}),
}
BYTES_CHANGED: dict[str, Callable[[bytes], bytes]] = {
    "brackets": lambda content: assemble("[" * 200_000),
    "a header of 30 MB": lambda content: assemble("[" + "[]," * 10_000_000 + "[]]"),
    "an unknown field": lambda content: header(content, more=1),
    "a number as text": lambda content: header(content, round="2"),
    "a flag as number": lambda content: header(content, num_examples=True),
    "a tensor of no payload": stray,
    "a key twice": repeated,
    "a header that is not there": lambda content: (2**63).to_bytes(8, "little") + content[8:],
}


@pytest.mark.parametrize("attack", [*CHANGES, *BYTES_CHANGED])
def test_an_invalid_update_has_the_effect_of_an_absent_node(
    attack: str, toys: MakeToys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setup = toy_setup(PARTIAL, algorithm=Scaffold(), module=Rich())
    away = after_round_two(toys(setup, "away"), tmp_path / "a", None)
    capfd.readouterr()

    def act(good: Callable[[bytes], bytes], content: bytes) -> bytes:
        answer = good(content)
        if attack in CHANGES:
            return to_bytes(CHANGES[attack](from_bytes(answer)))
        return BYTES_CHANGED[attack](answer)

    assert after_round_two(toys(setup, "hostile"), tmp_path / "b", act) == away
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fedlight: client 1 (node 12) sent ")
    assert line.endswith(": refused")
    assert len(line) < 500


def test_the_largest_allowed_weight_and_value_give_a_finite_mean(
    toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL), "toys")
    good, honest = over.grid.nodes[12].act, over.grid.nodes[11].act
    sent: list[bytes] = []
    over.grid.nodes[11].act = lambda content: sent.append(honest(content)) or sent[-1]

    def act(content: bytes) -> bytes:
        update = tensor(from_bytes(good(content)), **{BIAS: torch.tensor([LARGEST])})
        return to_bytes(replace(update, num_examples=MOST_EXAMPLES, loss=LARGEST))

    over.grid.nodes[12].act = act
    over.run(1)
    honest = from_bytes(sent[0])
    mean = (2 * float(honest.payloads["shared"].tensors[BIAS]) + 10**9 * LARGEST) / (2 + 10**9)
    assert float(over.server.theta[BIAS]) == pytest.approx(mean)
    assert "fedlight: client 1 counts as 1,000,000,000 images in the mean\n" in capfd.readouterr().out


def test_text_from_a_node_is_logged_on_one_line(toys: MakeToys, capfd: pytest.CaptureFixture[str]) -> None:
    over = toys(toy_setup(PARTIAL), "toys")
    over.run(1)
    capfd.readouterr()
    over.grid.nodes[12].problem = "x\nfedlight: client 0 was refused\x1b[2J\u202e"
    over.run(2)
    (line,) = capfd.readouterr().err.splitlines()
    assert r"(x\nfedlight: client 0 was refused\x1b[2J\u202e); it drops out" in line
    assert line.isprintable()


def test_text_is_made_printable_and_cut() -> None:
    assert printable("a\tü\r\n\x00\ud800") == r"a\tü\r\n\x00\ud800"
    assert printable("x" * 300) == "x" * 300
    assert printable("x" * 301) == "x" * 299 + "…"
    assert len(printable("\n" * 10**6, 10)) == 10


@pytest.mark.parametrize(
    "words",
    [{CLIENT: -1}, {CLIENT: 2**31}, {CLIENT: "1"}, {CLIENT: 1.0}, {"more": 1}, {PROBLEM: "x" * 10**5}],
)
def test_words_of_another_schema_are_refused(words: dict[str, Any]) -> None:
    opened = open_words(wrap(b"", words))
    assert opened.keys() == {PROBLEM}
    assert str(opened[PROBLEM]).startswith("invalid words")
    assert open_words(wrap(b"", {CLIENT: 1, PROBLEM: "a\nb"})) == {CLIENT: 1, PROBLEM: r"a\nb"}


def test_other_records_than_those_of_a_message_are_refused() -> None:
    good = wrap(b"content", {})
    assert open_bytes(good) == b"content"
    for records in ({"more": ConfigRecord({})}, {BYTES: ConfigRecord({})}, {BYTES: ArrayRecord()}):
        with pytest.raises(Damaged):
            open_bytes(RecordDict({WORDS: good[WORDS], BYTES: good[BYTES], **records}))


# --- scores


@pytest.mark.parametrize(
    ("change", "error_line"),
    [
        (lambda s: replace(s, client=0), "is of client 0"),
        (lambda s: replace(s, sha256="abc"), "sha256"),
        (lambda s: replace(s, metrics={"fid": 1.0}), "no images were requested"),
        (lambda s: replace(s, payloads={"grid": Payload({}, 0)}), "no images were requested"),
        (lambda s: Update("toy", 1, 1, 1, 1.0, {}), "this is a Update"),
    ],
)
def test_a_node_that_refuses_the_fingerprint_leaves_those_of_others(
    change: Callable[[Scores], Any], error_line: str, toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL), rounds=1)
    over.run(1)
    capfd.readouterr()
    good = over.grid.nodes[12].act
    over.grid.nodes[12].act = lambda content: to_bytes(change(from_bytes(good(content))))
    answers = list(over.transport.evaluate(over.server.evaluations([0, 1], draw=False)))
    assert [scores.client for scores in answers] == [0]
    (line,) = capfd.readouterr().err.splitlines()
    assert error_line in line
    assert line.endswith(": refused")


def test_a_cell_completes_without_the_client_that_does_not_answer(
    cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Processes.evaluate
    monkeypatch.setattr(
        Processes,
        "evaluate",
        lambda self, requests: (scores for scores in answers(self, requests) if scores.client != 1),
    )
    options = ["evaluation.samples=0", "evaluation.grid=2", "evaluation.steps=2", "data.limit=40"]
    done = cell("method=UDEC", "clients=3", "rounds=1", "epochs=1", "trainer.workers=1", *options)
    assert done.result["status"] == "completed"
    first, absent, last = done.result["client_sha256"]
    assert absent is None
    assert len(first) == len(last) == 64


COPIES = {
    "generated": torch.ones(70, dtype=torch.float64),
    "unseen": torch.ones(9, dtype=torch.float64),
    "duplicates": torch.zeros(3, dtype=torch.int64),
}


def test_scores_must_have_the_metrics_and_images_of_the_cells_evaluation() -> None:
    chosen = config("evaluation.samples=70", "evaluation.memorisation=true")
    grid = {"images": torch.zeros(4, *chosen.data.shape, dtype=torch.uint8)}
    check_scores(drawn(METRICS, grid=grid, memorisation=COPIES), chosen)
    check_scores(drawn({**METRICS, "coverage.share": 1.0}, grid=grid, memorisation=COPIES), chosen)
    wrong: list[tuple[dict[str, float], dict[str, dict[str, Tensor]]]] = [
        (METRICS, {}),
        (METRICS, {"memorisation": COPIES}),
        (METRICS, {"grid": grid}),
        (METRICS, {"grid": {"images": grid["images"][:3]}, "memorisation": COPIES}),
        (METRICS, {"grid": {"images": grid["images"].float()}, "memorisation": COPIES}),
        (METRICS, {"grid": {**grid, "more": torch.ones(1)}, "memorisation": COPIES}),
        (METRICS, {"grid": grid, "memorisation": {**COPIES, "unseen": torch.zeros(0).double()}}),
        (METRICS, {"grid": grid, "memorisation": {**COPIES, "generated": -COPIES["generated"]}}),
        ({"fid": 1.0}, {"grid": grid, "memorisation": COPIES}),
        ({**METRICS, "own_fud": 1.0}, {"grid": grid, "memorisation": COPIES}),
    ]
    for metrics, groups in wrong:
        with pytest.raises(Damaged):
            check_scores(drawn(metrics, **groups), chosen)
    resampled = config("evaluation.samples=70", "evaluation.bootstrap=20")
    check_scores(drawn({**METRICS, "fid_standard_error": 0.1}, grid=grid), resampled)
    with pytest.raises(Damaged, match="lacks the metric fid_standard_error"):
        check_scores(drawn(METRICS, grid=grid), resampled)
    unscored = config("evaluation.samples=0")
    check_scores(drawn({}, grid=grid), unscored)
    with pytest.raises(Damaged, match="has the metric fid, which this cell does not compute"):
        check_scores(drawn({"fid": 1.0}, grid=grid), unscored)


# --- at a node


@dataclass(frozen=True)
class Sent:
    """What an honest server sends to client 1: a broadcast in the third round, and an evaluation."""

    over: Toys
    broadcast: Broadcast
    evaluation: Evaluation


@pytest.fixture
def sent(toys: MakeToys) -> Sent:
    chosen = {"algorithm": Scaffold(), "codec": Codec(down=[TopK(0.5)], seeded_start=True)}
    over = toys(toy_setup(PARTIAL, module=Rich(), **chosen), shows=True)
    over.run(2)
    (evaluation,) = over.server.evaluations([1], draw=True)
    (_, broadcast) = over.server.start_round()
    return Sent(over, broadcast, evaluation)


def slice_changed(message: Any, slice_: str, params: int | None = None, **tensors: Tensor | None) -> Any:
    payload = message.payloads[slice_]
    remaining = {name: value for name, value in (payload.tensors | tensors).items() if value is not None}
    changed = Payload(remaining, payload.params if params is None else params)
    return replace(message, payloads={**message.payloads, slice_: changed})


DELTA = "delta/000003"
BROADCASTS: dict[str, Callable[[Broadcast], Any]] = {
    "round -1": lambda b: replace(b, round=-1),
    "round 0": lambda b: replace(b, round=0),
    "a round before": lambda b: replace(b, previous=3),
    "drops out": lambda b: replace(b, drops_out=True),
    "uplink twice": lambda b: replace(b, uplink=("shared", "shared")),
    "undeclared": lambda b: replace(b, uplink=("own",)),
    "no slice": lambda b: replace(b, payloads={}),
    "a private slice": lambda b: replace(b, payloads={**b.payloads, "own": b.payloads["shared"]}),
    "params": lambda b: slice_changed(b, "shared", 5),
    "no delta": lambda b: slice_changed(b, "shared", **{DELTA: None}),
    "another delta": lambda b: slice_changed(b, "shared", **{"delta/000009": torch.zeros(1)}),
    "a short delta": lambda b: slice_changed(
        b, "shared", **{DELTA: b.payloads["shared"].tensors[DELTA][:-1]}
    ),
    "positions": lambda b: slice_changed(
        b, "shared", **{DELTA: torch.full_like(b.payloads["shared"].tensors[DELTA], 255)}
    ),
    "a table": lambda b: slice_changed(b, "shared", **{"shared.more.table": torch.tensor([9, 9, 9])}),
    "an unknown variate": lambda b: slice_changed(b, "algorithm", x=torch.zeros(1)),
    "a variate's shape": lambda b: slice_changed(b, "algorithm", **{BIAS: torch.zeros(7)}),
    "a variate of nan": lambda b: slice_changed(b, "algorithm", **{BIAS: torch.tensor([torch.nan])}),
    "a huge variate": lambda b: slice_changed(b, "algorithm", **{BIAS: torch.tensor([2 * LARGEST])}),
}
EVALUATIONS: dict[str, Callable[[Evaluation], Any]] = {
    "fewer slices": lambda e: replace(e, payloads={"own": e.payloads["own"]}),
    "nan": lambda e: slice_changed(e, "own", **{"own.bias": torch.full((2,), torch.nan)}),
    "shape": lambda e: slice_changed(e, "own", **{"own.bias": torch.zeros(3)}),
    "dtype": lambda e: slice_changed(e, "own", **{"own.bias": torch.zeros(2).half()}),
    "a round to come": lambda e: replace(e, previous=5),
    "scores": lambda e: Scores(1, "0" * 64, {}, {}),
}


@pytest.mark.parametrize("change", [*BROADCASTS, *EVALUATIONS])
def test_an_invalid_message_of_the_server_changes_nothing_at_a_node(change: str, sent: Sent) -> None:
    node = sent.over.institutions[1]
    before = files(node.folder)
    wrong = (
        BROADCASTS[change](sent.broadcast) if change in BROADCASTS else EVALUATIONS[change](sent.evaluation)
    )
    with pytest.raises(Damaged):
        node.answer(to_bytes(wrong))
    assert files(node.folder) == before
    assert isinstance(from_bytes(node.answer(to_bytes(sent.evaluation))), Scores)
    assert isinstance(from_bytes(node.answer(to_bytes(sent.broadcast))), Update)


def test_a_first_broadcast_has_all_slices_and_no_delta(toys: MakeToys) -> None:
    over = toys(toy_setup(FULL, codec=Codec(down=[TopK(0.5)])), "toys")
    (_, first) = over.server.start_round()
    node = over.institutions[1]
    delta = slice_changed(first, "shared", **dict.fromkeys(first.payloads["shared"].tensors))
    delta = slice_changed(delta, "shared", **{"delta/000001": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(Damaged, match="that do not lead from round 0 to 1"):
        node.answer(to_bytes(delta))
    assert isinstance(node.read(to_bytes(first)), Broadcast)


def test_a_client_reports_its_number_of_images_unless_privacy_hides_it() -> None:
    received = {"all": {"weight": torch.zeros(2)}}

    def admitted(private: bool, images: int, loss: float | None = None) -> bool:
        payloads = {"all": Payload.plain({"weight": torch.ones(2)})}
        try:
            check_update(Update("cell", 1, 0, images, loss, payloads), received, {}, False, Chain(), private)
        except Damaged:
            return False
        return True

    counts = (0, 1, 2, MOST_EXAMPLES, MOST_EXAMPLES + 1)
    assert [images for images in counts if admitted(False, images)] == [1, 2, MOST_EXAMPLES]
    assert [images for images in counts if admitted(True, images)] == [0]
    losses = (0.0, -(2.0**60), 2.0**61, float("nan"))
    assert [loss for loss in losses if admitted(False, 1, loss)] == [0.0, -(2.0**60)]
    assert not [loss for loss in losses if admitted(True, 0, loss)]


def test_values_and_counters_of_a_model_are_bounded() -> None:
    first = {
        "weight": torch.ones(2),
        "nothing": torch.ones(0),
        "count": torch.tensor(1),
        "small": torch.tensor(1, dtype=torch.int8),
        "flag": torch.tensor(False),
        "order": torch.tensor([0, 1]),
    }
    slices = SliceMap({"all": tuple(first)})

    def refusal(**changed: Tensor) -> str:
        payloads = {"all": Payload.plain({**first, **changed})}
        try:
            check_evaluation(Evaluation("cell", 1, 0, 0, False, payloads), first, slices)
        except Damaged as error:
            return str(error)
        return ""

    at_most = {"weight": torch.tensor([-(2.0**60), 0]), "count": torch.tensor(2**53)}
    assert refusal() == refusal(**at_most, small=torch.tensor(63, dtype=torch.int8)) == ""
    assert refusal(count=torch.tensor(-(2**53)), flag=torch.tensor(True)) == ""
    too_large = "has a value of 2.31e+18 in weight; 1.15e+18 is the largest allowed"
    for name, tensor, reason in (
        ("weight", torch.tensor([0, -(2.0**61)]), too_large),
        ("weight", torch.tensor([0, torch.inf]), "has values that are not finite in weight"),
        ("weight", torch.tensor([torch.nan, 0]), "has values that are not finite in weight"),
        ("count", torch.tensor(2**53 + 1), "has a count of 9007199254740993 in count"),
        ("count", torch.tensor(-(2**53) - 1), "has a count of -9007199254740993 in count"),
        ("small", torch.tensor(64, dtype=torch.int8), "has a count of 64 in small"),
        ("order", torch.tensor([1, 0]), "changes the integers of order"),
        ("order", torch.tensor([0, 1, 2]), "states 8 parameters in slice all, which has 7"),
        ("flag", torch.tensor(0), "has flag of torch.int64 and shape () instead of torch.bool and ()"),
    ):
        assert refusal(**{name: tensor}) == reason


# --- the socket of an institution's resident process


def test_the_socket_has_a_short_path_under_a_long_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    for folder in (tmp_path, long):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        path = socket_path(2**22)
        assert len(str(path)) <= LONGEST_SOCKET
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
        path.unlink()
        assert path.parent.stat().st_mode & 0o077 == 0


def test_a_socket_is_not_made_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = socket_path(1).parent
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        socket_path(1)


def test_a_resident_process_ends_with_its_supernode(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "socket"
    path.touch()
    started = [sys.executable, "-m", "fedlight.deployment.resident", str(path), str(ended.pid)]
    with subprocess.Popen(started) as process:
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert not path.exists()


def test_an_error_in_a_resident_process_is_told_there_alone_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "socket"
    monkeypatch.setattr(sys, "argv", ["resident", str(path), str(os.getpid())])
    process = os.fork()
    if process == 0:
        try:
            resident.main()
        finally:
            os._exit(1)
    begun = time.monotonic()

    def connected() -> Connection:
        while True:
            try:
                return Client(str(path), "AF_UNIX")
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() - begun < 20

    try:
        for _ in range(2):
            with connected() as asking:
                asking.send_bytes(b"{")
                asking.send_bytes(b"")
                assert (asking.recv_bytes(), asking.recv_bytes()) == (b"failed", b"")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    printed = capfd.readouterr().err
    assert printed.count("fedlight: error: Expecting property name enclosed in double quotes") == 2
    assert printed.count("Traceback") == 2
    assert printed.count("json.loads(arguments)") == 2


# --- what an institution's app hands on


def test_an_app_forwards_messages_and_sends_only_what_was_agreed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cell.yaml"
    path.write_text("rounds: 1\n")
    agreed_to = hashlib.sha256(b"rounds: 1\n").hexdigest()
    monkeypatch.chdir(tmp_path)

    def answered(content: Any, problem: bytes, reply: bytes, **config: Any) -> tuple[Any, Any, bytes]:
        """The answer, and what reached the resident process."""
        ours, theirs = Pipe()
        theirs.send_bytes(problem)
        theirs.send_bytes(reply)
        monkeypatch.setattr(relay, "_connect_resident", lambda: ours)
        answer = relay.answer(content, path, {"client": 2, "agreed": agreed_to, **config})
        if not theirs.poll():
            return answer, None, b""
        return answer, json.loads(theirs.recv_bytes()), theirs.recv_bytes()

    whose = {"path": str(path), "agreed": agreed_to, "client": 2, "key": None}
    answer, said, sent = answered(wrap(b"broadcast", {}), b"", b"update", memory="kept", **{"data-root": "x"})
    assert said == {**whose, "root": str(tmp_path / "x"), "memory": str(tmp_path / "kept")}
    assert (sent, open_bytes(answer)) == (b"broadcast", b"update")
    assert open_words(answer) == {CLIENT: 2, HASH: agreed_to}

    answer, said, sent = answered(wrap(b"", {}), b"memory lost", b"")
    assert said == {**whose, "root": None, "memory": str(tmp_path / "memory")}
    assert (sent, open_bytes(answer)) == (b"", b"")
    assert open_words(answer) == {CLIENT: 2, HASH: "", PROBLEM: "memory lost"}

    unknown = RecordDict({"more": ConfigRecord({})})
    for content, node_config, words in (
        (wrap(b"broadcast", {}), {"agreed": 64 * "0"}, {CLIENT: 2, HASH: 64 * "0"}),
        (unknown, {}, {CLIENT: 2, HASH: "", PROBLEM: "failed"}),
    ):
        answer, said, _ = answered(content, b"", b"update", **node_config)
        assert (said, open_bytes(answer), open_words(answer)) == (None, b"", words)
    error_line = capsys.readouterr()
    assert f"has the SHA-256 {agreed_to}, and {64 * '0'} was agreed: refused" in error_line.out
    assert "more records than a message and its words: refused" in error_line.err
