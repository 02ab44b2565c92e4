"""Institutions that share nothing: messages over Flower, who is away, what is refused, and the app for it."""

import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Cell, invoke
from consortium import Consortium, consortium_of_three, missing, until, update_in
from masked import write_key
from PIL import Image
from toy import FULL, PARTIAL, federate, inline, toy_server, toy_setup, toy_site

from fedlight import deploy
from fedlight.deployment.agreement import hash_agreement
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.codec import Codec
from fedlight.federation.cohort import Participation
from fedlight.federation.messages import Payload, Update, from_bytes, to_bytes
from fedlight.federation.secure.signatures import Signer
from fedlight.federation.server import Server
from fedlight.federation.transforms.topk import TopK
from fedlight.federation.transport.node_keys import fingerprint_of
from fedlight.runs.identity import cell_id
from fedlight.runtime.errors import BadInput, Damaged

pytest.importorskip("flwr")

from grid import Node, Toys, new_key

from fedlight.deployment.deployable import load_agreed_config
from fedlight.deployment.institution import Institution
from fedlight.deployment.participants import set_up_institution, set_up_server
from fedlight.deployment.terms import Terms

MakeToys = Callable[..., Toys]


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeToys:
    return lambda setup: Toys(setup, tmp_path / "toys", monkeypatch)


def last_update(institution: Institution) -> Update:
    """The update that left last."""
    left = [from_bytes(path.read_bytes()) for path in (institution.folder / "answers").iterdir()]
    return max(left, key=lambda update: update.round)


def same(server: Server, other: Server) -> bool:
    return all(tensor.equal(other.theta[name]) for name, tensor in server.theta.items())


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"method": PARTIAL},
        {"algorithm": Scaffold()},
        {"codec": Codec(up=[TopK(0.5)]), "method": FULL},
        {"codec": Codec(down=[TopK(0.5)], seeded_start=True), "method": PARTIAL},
    ],
)
def test_the_bits_are_those_of_clients_in_one_process(
    chosen: dict[str, Any], toys: MakeToys, tmp_path: Path
) -> None:
    plain, over = toy_server(toy_setup(**chosen)), toys(toy_setup(**chosen))
    for _ in federate(plain, inline(toy_site(toy_setup(**chosen), tmp_path / "plain")), 3):
        pass
    over.run(3)
    assert same(over.server, plain)
    assert over.server.ledger.rows() == plain.ledger.rows()


def test_who_is_away_drops_out_and_goes_on_when_it_is_back(
    toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL))
    over.run(1)
    over.grid.nodes[12].online = False
    over.run(3)
    assert capfd.readouterr().err.count("client 1 (node 12) has no node online") == 2
    up = [(row.round, row.client) for row in over.server.ledger.entries if row.direction == "up"]
    assert up == [(1, 0), (1, 1), (2, 0), (3, 0)]
    down = {(row.round, row.client) for row in over.server.ledger.entries if row.direction == "down"}
    assert down == {*up}, "nothing was sent to who is away"
    assert over.server.ledger.visits == 8
    alone = last_update(over.institutions[0])
    assert all(over.server.theta[n].equal(t) for n, t in alone.payloads["shared"].tensors.items())
    over.grid.nodes[12].online = True
    over.run(4)
    assert over.server.met == {0: 4, 1: 4}
    assert sorted(row.client for row in over.server.ledger.entries if row.round == 4) == [0, 0, 1, 1]


def test_whoever_never_answers_costs_the_time_limit_and_no_more(
    toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL))
    over.run(1)
    over.grid.nodes[12].silent = True
    begun = time.monotonic()
    over.run(2)
    assert 0.5 < time.monotonic() - begun < 3
    assert "client 1 (node 12) did not answer within 0.5 s; it drops out" in capfd.readouterr().err
    assert over.server.met == {0: 2, 1: 1}
    over.grid.nodes[12].silent = False
    over.run(3)
    assert over.server.met == {0: 3, 1: 3}


def test_a_node_that_does_not_say_who_it_is_keeps_nobody_waiting(
    toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL))
    over.grid.nodes[12].expired = True
    over.run(1)
    assert "fedlight: node 12 cannot take part (no answer): refused" in capfd.readouterr().err
    assert over.server.met == {0: 1}


def test_a_round_waits_for_somebody_where_nobody_is_there(
    toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL))
    over.run(1)
    for node in over.grid.nodes.values():
        node.online = False
    begun = time.monotonic()
    over.run(2)
    assert 0.5 < time.monotonic() - begun < 3
    assert capfd.readouterr().err.count("has no node online; it drops out") == 2
    assert over.server.met == {0: 1, 1: 1}


def changed(update: Update, **tensors: torch.Tensor) -> Update:
    shared = update.payloads["shared"]
    return replace(update, payloads={"shared": Payload({**shared.tensors, **tensors}, shared.params)})


BIAS = "shared.bias"
BAD: dict[str, tuple[Callable[[Update], Update], str]] = {
    "nan": (
        lambda u: changed(u, **{BIAS: torch.tensor([torch.nan])}),
        "has values that are not finite in shared.bias",
    ),
    "infinity": (
        lambda u: changed(u, **{BIAS: torch.tensor([-torch.inf])}),
        "has values that are not finite in shared.bias",
    ),
    "shape": (
        lambda u: changed(u, **{BIAS: torch.zeros(2)}),
        r"has shared.bias of torch.float32 and shape \(2,\)",
    ),
    "dtype": (lambda u: changed(u, **{BIAS: torch.zeros(1, dtype=torch.float64)}), "of torch.float64"),
    "name": (lambda u: changed(u, **{"own.bias": torch.zeros(2)}), "has a tensor own.bias in slice shared"),
    "slice": (
        lambda u: replace(u, payloads={**u.payloads, "own": u.payloads["shared"]}),
        "reports own, shared instead of shared",
    ),
    "nothing": (lambda u: replace(u, payloads={}), "reports nothing instead of shared"),
    "extras": (
        lambda u: replace(u, payloads={**u.payloads, "algorithm": u.payloads["shared"]}),
        "reports algorithm, shared instead of shared",
    ),
    "other": (lambda u: replace(u, client=0), "answers another broadcast"),
    "earlier": (lambda u: replace(u, round=1), "answers another broadcast"),
    "count": (lambda u: replace(u, num_examples=-5), "num_examples: Input should be greater"),
    "loss": (lambda u: replace(u, loss=float("inf")), "JSON holds Infinity"),
    "params": (
        lambda u: replace(u, payloads={"shared": replace(u.payloads["shared"], params=9)}),
        "states 9 parameters in slice shared, which has 3",
    ),
}


@pytest.mark.parametrize("damage", [*BAD, "flip", "text", "kind"])
def test_a_bad_update_is_refused_in_one_line_and_changes_nothing(
    damage: str, toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL))
    over.run(1)
    good = over.grid.nodes[12].act

    def bad(content: bytes) -> bytes:
        answer = bytearray(good(content))
        if damage == "flip":
            answer[12] ^= 1
            return bytes(answer)
        if damage in ("text", "kind"):
            return b"no message" if damage == "text" else content
        return to_bytes(BAD[damage][0](from_bytes(bytes(answer))))

    over.grid.nodes[12].act = bad
    over.run(2)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fedlight: client 1 (node 12) sent ")
    assert line.endswith(": refused")
    assert re.search(BAD[damage][1] if damage in BAD else "cannot be read", line)
    alone = last_update(over.institutions[0])
    assert all(over.server.theta[n].equal(t) for n, t in alone.payloads["shared"].tensors.items())
    assert over.server.met == {0: 2, 1: 1}


@pytest.mark.parametrize(
    ("aux", "error_line"),
    [
        (None, "reports shared instead of algorithm, shared"),
        ({"shared.bias": torch.zeros(2)}, r"has shared.bias of torch.float32 and shape \(2,\)"),
        ({"own.bias": torch.zeros(1)}, "has a tensor own.bias"),
    ],
)
def test_an_update_whose_control_variates_are_not_those_of_its_slices_is_refused(
    aux: dict[str, torch.Tensor] | None, error_line: str, toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL, algorithm=Scaffold()))
    good = over.grid.nodes[12].act

    def bad(content: bytes) -> bytes:
        update = from_bytes(good(content))
        payloads = {name: payload for name, payload in update.payloads.items() if name != "algorithm"}
        if aux is not None:
            payloads["algorithm"] = Payload(aux, sum(tensor.numel() for tensor in aux.values()))
        return to_bytes(replace(update, payloads=payloads))

    over.grid.nodes[12].act = bad
    over.run(1)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(f"client 1 .node 12. sent an update that {error_line}.*: refused", line), line
    assert over.server.met == {0: 1}


def test_a_flipped_bit_in_a_tensor_that_stays_finite_is_not_noticed_here_but_by_tls(toys: MakeToys) -> None:
    over = toys(toy_setup(PARTIAL))
    good = over.grid.nodes[12].act
    over.grid.nodes[12].act = lambda content: good(content)[:-4] + bytes([0, 0, 0, 0])
    over.run(1)
    assert over.server.met == {0: 1, 1: 1}  # an institution may always send numbers of its own choosing


def test_a_client_whose_memory_is_lost_is_met_anew(toys: MakeToys, capfd: pytest.CaptureFixture[str]) -> None:
    over = toys(toy_setup(PARTIAL))
    over.run(1)
    over.grid.nodes[12].problem = "memory lost"
    over.run(2)
    assert "client 1 (node 12) has no update (memory lost)" in capfd.readouterr().err
    shutil.rmtree(over.institutions[1].folder / "clients")
    over.grid.nodes[12].problem = ""
    over.run(3)
    assert over.server.met == {0: 3, 1: 3}
    down = {row.slice for row in over.server.ledger.entries if (row.round, row.client) == (3, 1)}
    assert down == {"own", "shared"}


def test_a_client_that_was_away_often_still_has_what_it_kept(toys: MakeToys) -> None:
    over = toys(toy_setup(PARTIAL))
    good = over.grid.nodes[12].act
    over.run(1)

    def late(content: bytes) -> bytes:
        good(content)  # it trains and keeps its memory, and its update is lost
        return b"lost"

    over.grid.nodes[12].act = late
    over.run(5)
    over.grid.nodes[12].act = good
    over.run(6)
    assert over.server.met == {0: 6, 1: 6}


def test_strangers_are_refused_by_name(toys: MakeToys, capfd: pytest.CaptureFixture[str]) -> None:
    over = toys(toy_setup(PARTIAL))
    over.run(1)
    over.grid.nodes |= {13: Node(1), 14: Node(0, agreed="another")}
    over.grid.nodes[15] = Node(1, key=over.grid.nodes[12].key)
    over.run(2)
    lines = sorted(capfd.readouterr().err.splitlines())
    own = fingerprint_of(over.grid.nodes[12].key)
    assert lines[0].startswith(
        f"fedlight: node 13 says that it is client 1, which belongs to the key {own}, and"
    )
    assert lines[1:] == [
        "fedlight: node 14 has not agreed to this configuration: refused",
        "fedlight: node 15 says that it is client 1, which node 12 is: refused",
    ]
    assert over.server.met == {0: 2, 1: 2}


def test_a_number_stays_with_its_key_while_its_node_is_away(
    toys: MakeToys, capfd: pytest.CaptureFixture[str]
) -> None:
    over = toys(toy_setup(PARTIAL))
    over.run(1)
    over.grid.nodes[12].online = False
    over.grid.nodes[13] = Node(1, over.grid.nodes[12].act)
    over.run(4)
    refusals = [line for line in capfd.readouterr().err.splitlines() if "node 13" in line]
    keys = [fingerprint_of(over.grid.nodes[node].key) for node in (12, 13)]
    assert refusals == [
        f"fedlight: node 13 says that it is client 1, which belongs to the key {keys[0]}, and its own is "
        f"{keys[1]}; where a node was replaced, remove the line of client 1 from {over.notes / 'nodes.txt'}: "
        "refused"
    ]
    assert over.server.met == {0: 4, 1: 1}
    over.grid.nodes[12].online = True
    over.run(5)
    assert over.server.met == {0: 5, 1: 5}


def test_keys_are_bound_over_a_restart_of_the_server(toys: MakeToys) -> None:
    over = toys(toy_setup(PARTIAL))
    over.run(1)
    over.transport = over.start_server()
    del over.grid.nodes[12]
    over.grid.nodes[13] = Node(1, over.institutions[1].answer)
    over.run(2)
    assert over.server.met == {0: 2, 1: 1}

    notes = over.notes / "nodes.txt"
    (kept, removed) = notes.read_text().splitlines(keepends=True)
    assert removed.startswith("1 SHA256:")
    notes.write_text(kept)  # what the coordinator types where node 12 was replaced
    over.transport = over.start_server()
    over.run(3)
    assert over.server.met == {0: 3, 1: 3}
    assert notes.read_text() == f"{kept}1 {fingerprint_of(over.grid.nodes[13].key)}\n"


def test_a_key_is_one_client(toys: MakeToys, capfd: pytest.CaptureFixture[str]) -> None:
    over = toys(toy_setup(PARTIAL))
    over.grid.nodes[12].online = False
    over.run(1)
    over.grid.nodes[11].client = 1  # its node configuration now names the number of the other
    over.transport = over.start_server()
    over.run(2)
    assert (
        "node 11 says that it is client 1, and its key belongs to client 0: refused" in capfd.readouterr().err
    )
    assert over.server.met == {0: 1}


def test_an_agreement_may_list_the_keys(toys: MakeToys, capfd: pytest.CaptureFixture[str]) -> None:
    over = toys(toy_setup(PARTIAL))
    listed = [fingerprint_of(over.grid.nodes[node].key) for node in (11, 12)]
    first = over.grid.nodes | {13: Node(1, over.institutions[1].answer)}
    over.grid.nodes = {number: first[number] for number in (13, 12, 11)}  # the stranger comes first
    over.transport = over.start_server(listed)
    over.run(1)
    (line,) = capfd.readouterr().err.splitlines()
    stranger = fingerprint_of(over.grid.nodes[13].key)
    assert line == (
        f"fedlight: node 13 says that it is client 1, and its key {stranger} is not that client's in the "
        "agreement: refused"
    )
    assert over.server.met == {0: 1, 1: 1}
    assert not (over.notes / "nodes.txt").exists()


def test_a_node_without_a_key_is_nobody(toys: MakeToys, capfd: pytest.CaptureFixture[str]) -> None:
    over = toys(toy_setup(PARTIAL))
    over.grid.nodes[12].key = b""
    over.run(1)
    assert "node 12 has a key that cannot be read: refused" in capfd.readouterr().err
    assert over.server.met == {0: 1}


@pytest.mark.parametrize("line", ["1", "x SHA256:" + 43 * "A", "1 SHA256:abc", "1 MD5:" + 43 * "A"])
def test_damaged_bindings_are_told_in_one_line(line: str, toys: MakeToys) -> None:
    over = toys(toy_setup(PARTIAL))
    over.notes.mkdir(parents=True)
    (over.notes / "nodes.txt").write_text(f"{line}\n")
    with pytest.raises(BadInput, match="is no client number and fingerprint"):
        over.run(1)


def test_a_fingerprint_is_what_ssh_prints() -> None:
    """`ssh-keygen -lf` of the key, made by `ssh-keygen -t ecdsa -b 384`."""
    pem = b"""-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAElJiaQ1m10q02/C/9+0yqtdDhqltbPFXe
niH6tdsvjw21Jd31ygVmcn2C+XdEpS4U/A3gAW0Gp5s5dMmwGXYx2odsarLJlEHp
uJP5CfR1a22pzUCCNYUZsiaO6lHJLlrF
-----END PUBLIC KEY-----
"""
    assert fingerprint_of(pem) == "SHA256:qtniJ3+zYxdtYZJrIL11uF5xvsWeSkGQPthsOD7UKTc"


def test_a_cell_that_is_to_end_waits_for_no_answer(toys: MakeToys) -> None:
    over = toys(toy_setup())
    for node in over.grid.nodes.values():
        node.silent = True

    def stop() -> None:
        raise KeyboardInterrupt

    over.transport._context = replace(over.transport._context, monitor=SimpleNamespace(check=stop))
    with pytest.raises(KeyboardInterrupt):
        over.run(1)
    assert over.grid.count == 0


def test_an_institution_answers_only_what_it_agreed_to(toys: MakeToys) -> None:
    over = toys(toy_setup(PARTIAL))
    institution = over.institutions[1]
    (_, asked) = over.server.start_round()
    for wrong in (
        replace(asked, uplink=("own", "shared")),
        replace(asked, client=0),
        replace(asked, cell="another"),
        Update("toy", 1, 1, 1, None, {}),
    ):
        with pytest.raises(Damaged):
            institution.answer(to_bytes(wrong))
    assert not (institution.folder / "answers").exists()
    assert isinstance(from_bytes(institution.answer(to_bytes(asked))), Update)


def test_a_warm_start_lets_every_slice_leave_and_no_longer(toys: MakeToys) -> None:
    over = toys(toy_setup(PARTIAL.model_copy(update={"warm_start": 1})))
    over.run(2)
    up = {(row.round, row.slice) for row in over.server.ledger.entries if row.direction == "up"}
    assert up == {(1, "own"), (1, "shared"), (2, "shared")}
    (_, asked) = over.server.start_round()
    with pytest.raises(Damaged, match="does not let own leave"):
        over.institutions[1].answer(to_bytes(replace(asked, uplink=("own", "shared"))))


@pytest.mark.slow
def test_without_a_deployment_the_transport_says_how_to_get_one(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("transport=flower", "logger=none", "clients=2") == 2
    assert "fedlight deploy init FOLDER" in capfd.readouterr().err


COMMON = ["name=hospitals", "logger=none", "data.limit=120", "rounds=2", "epochs=1", "clients=3"]
COMMON += ["evaluation.steps=2", "evaluation.grid=0", "evaluation.samples=0"]


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app of a small FULL cell of three clients."""
    folder = tmp_path_factory.mktemp("app") / "app"
    assert invoke("init", str(folder), "method=FULL", *COMMON, main=deploy.main) == 0
    return folder


def look(app: Path, *more: str, agreed_to: str = "") -> int:
    hash_ = agreed_to or hash_agreement(app / "federation" / "cell.yaml")
    return invoke("check", str(app), "--client", "1", "--agreed", hash_, *more, main=deploy.main)


def test_the_app_holds_the_agreement_and_no_path_of_this_machine(app: Path) -> None:
    text = (app / "federation" / "cell.yaml").read_text()
    assert str(Path.home()) not in text
    assert os.environ["FEDLIGHT_CACHE"] not in text
    readme = (app / "README.md").read_text()
    assert f'agreed="{hashlib.sha256(text.encode()).hexdigest()}"' in readme
    assert "$" not in readme
    assert "FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1\nflower-supernode" in readme
    assert {path.name for path in (app / "federation").iterdir()} == {
        "__init__.py",
        "cell.yaml",
        "client_app.py",
        "server_app.py",
    }


def test_an_institution_sees_what_it_has_and_what_would_leave(
    app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert look(app) == 0
    out = capsys.readouterr().out
    assert hash_agreement(app / "federation" / "cell.yaml") in out
    assert "40 images of (1, 8, 8)" in out  # 120 over 3
    for slice_ in ("encoder", "bottleneck", "decoder"):
        assert re.search(rf"^  {slice_} +[\d,]+ trained parameters, [\d,]+ bytes$", out, re.M)
    assert out.endswith("never leaves: the images\n")


def test_an_agreement_names_the_sums_that_the_server_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sums"
    assert invoke("init", str(folder), *COMMON, "aggregation=secure", main=deploy.main) == 0
    readme = (folder / "README.md").read_text()
    seen = "Of the updates the server sees: sums of at least 2 clients; the keys of masks are "
    assert f"{seen}not signed: a server that replaces them sees single updates" in readme
    assert ' key="/path' not in readme
    assert "\naggregation:\n  name: secure\n" in (folder / "federation" / "cell.yaml").read_text()
    assert look(folder) == 0
    out = capsys.readouterr().out
    assert "leaves, in each of up to 2 rounds, masked:" in out
    assert "the server sees sums of at least 2 clients, and no single update" in out
    keys = ",".join(f"SHA256:{letter * 42}A" for letter in "ABC")
    signed = [*COMMON, "aggregation=secure", f"transport.nodes=[{keys}]"]
    assert invoke("init", str(tmp_path / "signed"), *signed, main=deploy.main) == 0
    readme = (tmp_path / "signed" / "README.md").read_text()
    assert f"{seen}signed by the nodes' keys, which the agreement lists.\n" in readme
    assert ' key="/path/to/node.key"\'\n' in readme


def test_an_institution_sees_how_long_a_warm_start_lets_everything_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "warm"
    assert invoke("init", str(folder), *COMMON, "rounds=5", "method=UDEC_WARM", main=deploy.main) == 0
    assert look(folder) == 0
    out = capsys.readouterr().out
    assert "\nleaves in the first 4 rounds alone: encoder, bottleneck\n" in out
    assert out.endswith("never leaves: the images\n")


def test_the_images_of_a_folder_are_all_the_institutions_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = tmp_path / "images", tmp_path / "app"
    (data / "scans").mkdir(parents=True)
    for number in range(10):
        Image.new("L", (8, 8), 20 * number).save(data / "scans" / f"{number}.png")
    folder = ["data=image_folder", "data.image_size=8", "data.channels=1", "method=UDEC"]
    assert invoke("init", str(other), *COMMON, *folder, main=deploy.main) == 0
    assert look(other, "--data-root", str(data)) == 0
    out = capsys.readouterr().out
    assert f"8 images of (1, 8, 8) to train on, from {data}" in out  # a fifth is held out
    assert out.endswith("never leaves: the images, encoder, bottleneck\n")

    path = other / "federation" / "cell.yaml"
    config, theirs = load_agreed_config(path, None), load_agreed_config(path, str(data))
    server, mine = set_up_server(config), set_up_institution(theirs, 1)
    assert [len(share) for share in server.client_indices] == [0, 0, 0]
    assert not server.dataset.train.pixels.any()
    assert [len(share) for share in mine.client_indices] == [0, 8, 0]
    assert cell_id(config.plain()) == cell_id(theirs.plain())


def test_another_configuration_than_the_agreed_one_is_refused(
    app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hash_agreement(app / "federation" / "cell.yaml")
    other = tmp_path / "other"
    shutil.copytree(app, other)
    path = other / "federation" / "cell.yaml"
    path.write_text(path.read_text().replace("rounds: 2", "rounds: 200"))
    assert look(other, agreed_to=before) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"fedlight: error: {path} has the SHA-256 {hash_agreement(path)}, and {before} was agreed"
    with pytest.raises(BadInput, match="was agreed"):
        Institution.make(path, before, 1, None, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_what_an_institution_keeps_is_for_its_user_alone(app: Path, toys: MakeToys, tmp_path: Path) -> None:
    path = app / "federation" / "cell.yaml"
    over = toys(toy_setup())
    before = os.umask(0)
    try:
        made = Institution.make(path, hash_agreement(path), 1, None, tmp_path / "memory")
        over.run(1)
    finally:
        os.umask(before)
    cell = cell_id(load_agreed_config(path, None).plain())
    assert (made.cell, made.client) == (cell, 1)
    assert made.folder == tmp_path / "memory" / cell / "checkpoint"
    own = over.institutions[1].folder
    for folder in (made.folder.parent, own, own / "answers"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_an_agreement_runs_no_code_of_others(
    app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(app, other)
    path = other / "federation" / "cell.yaml"
    path.write_text(path.read_text().replace("fedlight.data.digits.load", "os.getcwd"))
    assert look(other) == 2
    assert "data.source._target_ would run os.getcwd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "error_line"),
    [
        ("method=CENTRAL", "method=CENTRAL trains where all images are"),
        ("federation.dropout=0.1", "federation.dropout=0.1 simulates"),
        ("early_stopping=train_loss", "early_stopping would have models evaluated"),
        ("algorithm=fednova", "algorithm=fednova does not declare in aux_like"),
        ("evaluation.downstream=true", "evaluation.downstream=true compares with a classifier"),
        ("evaluation.background=true", "evaluation.background=true scores models where all of them are"),
        ("privacy=example", "privacy=example accounts for the size"),
        ("privacy=client privacy.secure_noise=false", "privacy.secure_noise=false draws noise from the seed"),
        ("aggregation=secure aggregation.threshold=4", "by 3 of 3 clients, and a sum has 4 at least"),
        ("aggregation=secure privacy=client", "aggregation=secure needs privacy.noise_at=clients"),
        ("aggregation=secure transform=topk", "aggregation=secure needs a transform without stages"),
        ("transport.nodes=[SHA256:abc]", "transport.nodes must list 3 fingerprints"),
        ("transport.nodes=[SHA256:abc,b,c]", "'SHA256:abc' is no fingerprint of a node's key"),
    ],
)
def test_what_cannot_be_deployed_is_told_before_anything_is_written(
    asked: str, error_line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("init", str(tmp_path / "app"), *COMMON, *asked.split(), main=deploy.main) == 2
    assert error_line in capsys.readouterr().err
    assert not (tmp_path / "app").exists()


def test_the_noise_of_a_deployment_is_not_drawn_from_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = tmp_path / "app"
    assert invoke("init", str(app), *COMMON, "privacy=client", main=deploy.main) == 0
    path = app / "federation" / "cell.yaml"
    privacy = load_agreed_config(path, None).privacy
    assert privacy is not None
    assert privacy.secure_noise
    path.write_text(path.read_text().replace("secure_noise: true", "secure_noise: false"))
    assert look(app) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "privacy.secure_noise=false draws noise from the seed, which every participant knows" in line


def test_an_agreement_holds_the_listed_keys(tmp_path: Path) -> None:
    keys = [fingerprint_of(new_key()) for _ in range(3)]
    listed = f"transport.nodes=[{','.join(keys)}]"
    assert invoke("init", str(tmp_path / "app"), *COMMON, listed, main=deploy.main) == 0
    transport = load_agreed_config(tmp_path / "app" / "federation" / "cell.yaml", None).transport
    assert transport is not None
    assert (transport.model_extra or {})["nodes"] == keys


def test_an_institution_compares_its_key_with_the_agreement(
    app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_key(tmp_path / f"node{number}.key") for number in range(3)]
    keys = [Signer(path).fingerprint for path in files]
    folder = tmp_path / "app"
    listed = f"transport.nodes=[{','.join(keys)}]"
    assert invoke("init", str(folder), *COMMON, listed, main=deploy.main) == 0
    assert " --key node.key\n" in (folder / "README.md").read_text()
    assert look(folder) == 0
    line = f"key            {keys[1]} was agreed; add --key node.key to compare yours\n"
    assert line in capsys.readouterr().out
    assert look(folder, "--key", str(files[1])) == 0
    assert f"key            {keys[1]}, as agreed\n" in capsys.readouterr().out
    for where, key, reason in (
        (folder, files[0], f"the agreement lists {keys[1]} for client 1"),
        (folder, tmp_path / "absent", "cannot be read: No such file or directory"),
        (app, files[1], "the agreement lists no keys of nodes (transport.nodes): leave --key out"),
    ):
        assert look(where, "--key", str(key)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert reason in err
        assert err.count("\n") == 1
    assert " --key " not in (app / "README.md").read_text()


def test_the_terms_are_those_of_the_agreement(tmp_path: Path) -> None:
    slices = ("encoder", "bottleneck", "decoder")
    for grid, due in ((2, [2, 4, 5]), (0, [])):
        app = tmp_path / f"app{grid}"
        more = ["method=UDEC", "rounds=5", "fraction=0.5", "evaluation.every=2", f"evaluation.grid={grid}"]
        assert invoke("init", str(app), *COMMON, *more, main=deploy.main) == 0
        config = load_agreed_config(app / "federation" / "cell.yaml", None)
        terms = Terms.make(config, config.method.resolve(slices), slices)
        assert [round_ for round_ in range(1, 6) if terms.draws_after(round_)] == due
        assert (terms.rounds, terms.method.uplink) == (5, ("decoder",))
        expected = Participation(3, 0.5, 0.0, config.seed)
        assert terms.participation == expected


def test_an_app_is_not_written_over(app: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("init", str(app), main=deploy.main) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """A SuperLink, and the keys of three institutions."""
    if absent := missing():
        pytest.skip(absent)
    with consortium_of_three(tmp_path_factory.mktemp("consortium") / "all") as found:
        yield found


JOINED = "Activated node_id"


STATEFUL = ["method=USPLIT", "algorithm=scaffold", "transform=topk"]
"""State on both sides, errors of encoding that clients keep, and an uplink that is dealt to pairs."""


@pytest.mark.slow
def test_over_tls_and_node_keys_the_bits_are_those_of_one_process(
    consortium: Consortium, cell: Callable[..., Cell], tmp_path: Path
) -> None:
    app = tmp_path / "app"
    assert invoke("init", str(app), *COMMON, *STATEFUL, main=deploy.main) == 0
    for client in range(3):
        consortium.start_node(app, client, f"node{client}")
    consortium.submit(app)
    plain, found = cell("clients=3", "transport=inline", *STATEFUL).result, consortium.result(app)
    for client in range(3):
        consortium.end(f"node{client}")
    assert found["status"] == "completed"
    for key in ("cell", "state_sha256", "train_loss", "exchange"):
        assert found[key] == plain[key]

    (bound,) = consortium.runs(app).glob("*/*/checkpoint/nodes.txt")
    keys = [consortium.fingerprint(f"node{client}") for client in range(3)]
    assert bound.read_text() == "".join(f"{client} {key}\n" for client, key in enumerate(keys))
    for client in range(3):
        sent = consortium.sent(app, f"node{client}")
        crossed = []
        for request in sent.requests():
            payloads = {}
            if update := update_in(request):
                payloads = update.payloads
                crossed += [(update.round, name, payload.bytes) for name, payload in payloads.items()]
            counted = sum(payload.bytes for payload in payloads.values())
            names = sum(len(payload.tensors) for payload in payloads.values())
            assert len(request) - counted < 2000 + 200 * names  # signed, and with the shapes of its tensors
        assert sorted(crossed) == sorted(
            (int(row["round"]), row["slice"], int(row["bytes"]))
            for row in consortium.rows(app, "ledger.csv")
            if (row["client"], row["direction"]) == (str(client), "up")
        )
        components = set_up_institution(load_agreed_config(app / "federation" / "cell.yaml", None), client)
        share = components.client_indices[client]
        assert len(share) == 40
        assert not sent.holds_any(components.dataset.train.pixels[share])
        reached = sent.addresses()
        assert f"('127.0.0.1', {consortium.port})" in reached
        assert len(reached) == 3  # the SuperLink, and inside the institution its SuperNode and its resident


@pytest.mark.slow
def test_a_wrong_certificate_and_an_unregistered_key_are_refused(app: Path, consortium: Consortium) -> None:
    consortium.make_certificate("other", "theirs")
    consortium.make_key("stranger", register=False)
    consortium.make_key("deceived")
    before = consortium.log("superlink").count(JOINED)
    consortium.start_node(app, 0, "stranger")
    consortium.start_node(app, 0, "deceived", ca="other")
    until(lambda: "Failed to activate SuperNode" in consortium.log("stranger"), 120)
    until(lambda: "certificate verify failed" in consortium.log("deceived"), 120)
    assert "SuperNode ID" not in consortium.log("stranger") + consortium.log("deceived")
    assert consortium.log("superlink").count(JOINED) == before
    for name in ("stranger", "deceived"):
        consortium.end(name)
