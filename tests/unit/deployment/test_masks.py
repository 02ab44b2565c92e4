"""Masked updates over Flower's messages: the sum is exact, whoever fails, and single updates are uniform."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sums import FIXED, secure_server, secure_setup
from toy import FULL, PARTIAL, federate, inline, toy_site

from fedlight.deployment.institution import make_masking
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.client import ClientSetup
from fedlight.federation.codec import Codec
from fedlight.federation.messages import Broadcast, MaskMessage, Payload, Update, from_bytes, to_bytes
from fedlight.federation.method import Method, Split
from fedlight.federation.secure.fixed_point import FixedPoint
from fedlight.federation.secure.integers import to_signed, unpack_integers
from fedlight.federation.secure.mask_bytes import KEYS_BYTES, SHARE_BYTES, token_bytes
from fedlight.federation.secure.masks import KeyPair, combine, commit, expand, share, transcript, unseal
from fedlight.federation.secure.secure_sum import INTEGERS
from fedlight.federation.secure.signatures import SIGNATURE_BYTES, Signer, signed_content
from fedlight.federation.secure.sum_sizes import group_slices
from fedlight.federation.server import Server
from fedlight.federation.slices import SliceMap
from fedlight.federation.transforms.quantisation import Quantisation
from fedlight.runtime.errors import BadInput, Damaged

pytest.importorskip("flwr")

from cryptography.hazmat.primitives.asymmetric import ec
from masked import NODE, MaskedToys, step_of, write_key

MakeMasked = Callable[..., MaskedToys]
Line = pytest.CaptureFixture[str]


@pytest.fixture
def masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeMasked:
    return lambda setup=None, clients=5, signers=(): MaskedToys(
        setup or secure_setup(), tmp_path / "masked", monkeypatch, clients, signers
    )


def plain_server(setup: Any, folder: Path, clients: int, rounds: int, reporting: set[int]) -> Server:
    """The same federation in one process, where only some clients report."""
    server, transport = secure_server(setup, clients), inline(toy_site(setup, folder))
    while server.round < rounds:
        for update in transport.exchange(server.start_round()):
            if update.client in reporting:
                server.receive(update)
        server.finish_round()
    return server


def same(server: Server, other: Server) -> bool:
    return all(tensor.equal(other.theta[name]) for name, tensor in server.theta.items())


@pytest.mark.parametrize(
    ("method", "fields", "chosen"),
    [
        (FULL, {}, {}),
        (PARTIAL, {"fixed": FixedPoint(8.0, 20, 40)}, {"algorithm": Scaffold()}),
    ],
)
def test_the_bits_and_the_ledger_are_those_of_one_process(
    method: Method, fields: dict[str, Any], chosen: dict[str, Any], masked: MakeMasked, tmp_path: Path
) -> None:
    over = masked(secure_setup(method, fields=fields, **chosen))
    over.run(2)
    plain = plain_server(secure_setup(method, fields=fields, **chosen), tmp_path / "plain", 5, 2, {*range(5)})
    assert same(over.server, plain)
    assert over.server.ledger.rows() == plain.ledger.rows()
    assert all(tensor.equal(plain.state[name]) for name, tensor in over.server.state.items())


@pytest.mark.parametrize("steps", [("key list",), ("share list",), ("survivors",), ("Broadcast",)])
def test_a_node_that_fails_between_the_steps_costs_its_own_update_alone(
    steps: tuple[str], masked: MakeMasked, tmp_path: Path, capfd: Line
) -> None:
    """After the masked updates a failure costs nothing: those that are left reveal what is needed."""
    over = masked()
    (step,) = steps
    over.kill(3, step)
    over.run(1)
    counted = {0, 1, 2, 4} | ({3} if step == "survivors" else set())
    plain = plain_server(secure_setup(), tmp_path / "plain", 5, 1, counted)
    assert same(over.server, plain)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fedlight: client 3 (node {NODE + 3}) sent a message that cannot be read")


def test_two_nodes_fail_at_different_steps_and_the_sum_is_that_of_the_others(
    masked: MakeMasked, tmp_path: Path
) -> None:
    setup = secure_setup(fields={"threshold": 3})
    over = masked(setup)
    over.kill(1, "key list")
    over.kill(2, "share list")
    over.run(1)
    assert same(over.server, plain_server(setup, tmp_path / "plain", 5, 1, {0, 3, 4}))
    assert over.server.met == dict.fromkeys((0, 3, 4), 1)
    over.run(2)  # two are away
    assert over.server.round == 2


def split_setup() -> ClientSetup:
    """A federation in which clients report different slices: one of a pair `own`, the other `shared`."""
    setup = secure_setup(fields={"threshold": 2})
    parts = {"own": ("own.weight",), "bias": ("own.bias",), "shared": ("shared.weight", "shared.bias")}
    slices, split = SliceMap(parts), Split(either=("own", "shared"), coin="bias")
    method = Method(name="SPLIT", downlink="all", uplink="all", split=split, evaluate="global")
    assert setup.secure
    secure = replace(setup.secure, slices=slices)
    return replace(setup, slices=slices, method=method.resolve(slices.names), secure=secure)


def test_slices_of_different_clients_have_masks_of_their_own(masked: MakeMasked, tmp_path: Path) -> None:
    over = masked(split_setup())
    over.kill(3, "share list")
    over.run(1)
    assert len(group_slices(over.server._open.planned)) > 1
    plain = plain_server(split_setup(), tmp_path / "plain", 5, 1, {0, 1, 2, 4})
    assert same(over.server, plain)
    assert not all(tensor.equal(over.setup.first[name]) for name, tensor in plain.theta.items())


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("Broadcast", "3 of 5 clients sent keys, and 4 are needed"),
        ("key list", "3 of 5 clients sent shares, and 4 are needed"),
        ("share list", "3 of 5 clients sent masked updates, and 4 are needed"),
        ("survivors", "3 clients reveal shares, and 4 are needed to unmask"),
    ],
)
def test_below_the_threshold_the_round_is_lost_and_the_next_one_counts(
    step: str, reason: str, masked: MakeMasked, tmp_path: Path, capfd: Line
) -> None:
    over = masked()
    before = dict(over.server.theta)
    for client in (0, 3):
        over.kill(client, step)
    over.run(1)
    assert all(tensor.equal(before[name]) for name, tensor in over.server.theta.items())
    lines = capfd.readouterr().err.splitlines()
    if step == "Broadcast":
        plain = plain_server(secure_setup(), tmp_path / "plain", 5, 1, {1, 2, 4})
        assert over.server.ledger.rows() == plain.ledger.rows()
    assert lines[-1] == f"fedlight: round 1: the round is lost: {reason}; the global model stays as it is"
    for client in (0, 3):
        over.grid.nodes[NODE + client].online = True
        over.grid.nodes[NODE + client].act = over._tapped(client)
    over.run(2)
    assert not all(tensor.equal(before[name]) for name, tensor in over.server.theta.items())


def test_a_single_masked_update_is_uniform_and_the_sum_is_not(masked: MakeMasked) -> None:
    """Chi-square over the bytes that the server received; without masks the same test fails at once."""
    over = masked(secure_setup(fields={"fixed": FixedPoint(8.0, 16, 64)}), 4)
    over.run(6)
    counts, plain_counts = np.zeros(256), np.zeros(256)
    for client, contents in over.received.items():
        for message in map(from_bytes, contents):
            if isinstance(message, Update):
                for payload in message.payloads.values():
                    counts += np.bincount(payload.tensors[INTEGERS].numpy(), minlength=256)
        kept = (over.institutions[client].folder / "answers").glob("*.safetensors")
        for path in kept:
            update = from_bytes(path.read_bytes())
            if isinstance(update, Update):
                for payload in update.payloads.values():
                    plain_counts += np.bincount(payload.tensors[INTEGERS].numpy(), minlength=256)
    assert counts.sum() == 4 * 6 * 8 * (11 + 2 * 2)
    assert chisquare(counts).pvalue > 1e-6
    assert chisquare(plain_counts).pvalue < 1e-100


def test_a_mask_is_uniform_and_that_of_its_key() -> None:
    for bits in (16, 24, 32, 64):
        mask = expand(bytes(range(32)), 20_000, bits)
        assert (mask == expand(bytes(range(32)), 20_000, bits)).all()
        assert int(mask.max()) < 2**bits
        top = np.bincount((mask >> np.uint64(bits - 4)).astype(int), minlength=16)
        assert chisquare(top).pvalue > 1e-6


def test_two_clients_agree_on_a_key_and_a_purpose() -> None:
    one, other = KeyPair(), KeyPair()
    assert one.agree(other.public, "a") == other.agree(one.public, "a") != one.agree(other.public, "b")
    assert KeyPair(one.secret).public == one.public
    with pytest.raises(Damaged, match="has a public key that is none"):
        one.agree(bytes(32), "a")


def test_shares_below_the_threshold_say_nothing() -> None:
    secret = bytes(range(16))
    shares = share(secret, 3, 5)
    assert combine(shares[2:]) == secret
    assert combine(shares[3:]) != secret


# --- nodes that lie ---


def first_byte(payload: Payload) -> Payload:
    """The payload with another bit in the last byte of its first tensor."""
    name, tensor = next(iter(payload.tensors.items()))
    changed = tensor.clone()
    changed[-1] ^= 1
    return Payload({**payload.tensors, name: changed}, payload.params)


def test_a_wrong_share_is_noticed_and_its_sender_named(
    masked: MakeMasked, tmp_path: Path, capfd: Line
) -> None:
    over = masked()

    def lie(message: MaskMessage) -> MaskMessage:
        return replace(message, payloads={**message.payloads, "seeds": first_byte(message.payloads["seeds"])})

    over.change(1, "survivors", lie)
    over.run(1)
    assert same(over.server, plain_server(secure_setup(), tmp_path / "plain", 5, 1, {*range(5)}))
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"fedlight: client 1 (node {NODE + 1}) revealed a share that does not fit those of the others"
    )


def test_a_wrong_commitment_costs_the_round_and_names_its_client(masked: MakeMasked, capfd: Line) -> None:
    over = masked()

    def lie(message: MaskMessage) -> MaskMessage:
        wrong = first_byte(message.payloads["commitments"])
        return replace(message, payloads={**message.payloads, "commitments": wrong})

    over.change(1, "Broadcast", lie)
    before = dict(over.server.theta)
    over.run(1)
    assert all(tensor.equal(before[name]) for name, tensor in over.server.theta.items())
    (line,) = capfd.readouterr().err.splitlines()
    assert "the shares of client 1 do not give the secret that it committed to" in line


def with_payload(message: Any, name: str, payload: Payload) -> Any:
    return replace(message, payloads={**message.payloads, name: payload})


def short(payload: Payload) -> Payload:
    return replace(payload, tensors={name: tensor[:-1] for name, tensor in payload.tensors.items()})


WRONG: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "short keys": (
        "Broadcast",
        lambda m: with_payload(m, "keys", short(m.payloads["keys"])),
        "has own of torch.uint8 and shape",
    ),
    "weak key": (
        "Broadcast",
        lambda m: with_payload(
            m, "keys", Payload({"own": torch.tensor([0] * 32 + [9] * 64, dtype=torch.uint8)}, 0)
        ),
        "has a public key that is none",
    ),
    "other payloads": ("Broadcast", lambda m: replace(m, payloads={}), "has other payloads than keys"),
    "other step": ("Broadcast", lambda m: replace(m, step="shares"), "sends shares, and keys come next"),
    "other client": ("Broadcast", lambda m: replace(m, client=0), "answers another message"),
    "other round": ("Broadcast", lambda m: replace(m, round=7), "answers another message"),
    "fewer shares": (
        "key list",
        lambda m: with_payload(m, "shares", Payload({}, 0)),
        "has 0 entries () instead of 4 entries",
    ),
    "typed shares": (
        "key list",
        lambda m: with_payload(
            m, "shares", Payload({n: t.to(torch.int64) for n, t in m.payloads["shares"].tensors.items()}, 0)
        ),
        "of torch.int64",
    ),
    "short vector": (
        "share list",
        lambda m: with_payload(m, "own", short(m.payloads["own"])),
        "has integers of torch.uint8 and shape (39,) instead of 40 bytes",
    ),
    "long vector": (
        "share list",
        lambda m: with_payload(m, "own", Payload({INTEGERS: torch.zeros(44, dtype=torch.uint8)}, 8)),
        "instead of 40 bytes",
    ),
    "signed vector": (
        "share list",
        lambda m: with_payload(m, "own", Payload({INTEGERS: torch.zeros(40, dtype=torch.int8)}, 8)),
        "has integers of torch.int8",
    ),
    "counted vector": (
        "share list",
        lambda m: with_payload(m, "own", replace(m.payloads["own"], params=9)),
        "states 9 parameters in slice own, which has 8",
    ),
    "missing slice": (
        "share list",
        lambda m: replace(m, payloads={"own": m.payloads["own"]}),
        "reports own instead of own, shared",
    ),
    "number of images": ("share list", lambda m: replace(m, num_examples=3), "states its number of images"),
    "foreign share": (
        "survivors",
        lambda m: with_payload(
            m,
            "seeds",
            replace(
                m.payloads["seeds"],
                tensors={n: torch.zeros_like(t) for n, t in m.payloads["seeds"].tensors.items()},
            ),
        ),
        "has a share that is none, or is that of another client",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_hostile_answer_is_refused_in_one_line_and_the_others_go_on(
    wrong: str, masked: MakeMasked, tmp_path: Path, capfd: Line
) -> None:
    step, change, reason = WRONG[wrong]
    over = masked()
    over.change(2, step, change)
    over.run(1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fedlight: client 2 (node {NODE + 2}) sent a message that ")
    assert line.endswith(": refused")
    assert reason in line
    counted = {0, 1, 3, 4} | ({2} if step == "survivors" else set())
    assert same(over.server, plain_server(secure_setup(), tmp_path / "plain", 5, 1, counted))


# --- a server that lies ---


def driven(over: MaskedToys, until: str, change: Callable[[Any], Any]) -> list[str]:
    """Runs a round in which the message of one step to client 0 is changed; the reasons of refusals."""
    act = over._tapped(0)

    def received(content: bytes) -> bytes:
        if step_of(content) == until:
            content = to_bytes(change(from_bytes(content)))
        return act(content)

    over.grid.nodes[NODE].act = received
    over.run(1)
    return over.refusals


def survivors(*clients: int) -> Callable[[Any], Any]:
    listed = torch.tensor(clients, dtype=torch.int32)
    return lambda m: with_payload(m, "clients", Payload({"survivors": listed}, 0))


def other_keys(message: MaskMessage, client: str) -> torch.Tensor:
    """The keys that a list has of a client, with other public keys."""
    return torch.cat([torch.arange(64, dtype=torch.uint8), message.payloads["keys"].tensors[client][64:]])


LIES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "another key of mine": (
        "key list",
        lambda m: with_payload(
            m, "keys", Payload({**m.payloads["keys"].tensors, "0": torch.zeros(96, dtype=torch.uint8)}, 0)
        ),
        "the key list has a key twice",
    ),
    "another valid key of mine": (
        "key list",
        lambda m: with_payload(
            m, "keys", Payload({**m.payloads["keys"].tensors, "0": other_keys(m, "0")}, 0)
        ),
        "has other keys of this client than it sent",
    ),
    "an unknown client": (
        "key list",
        lambda m: with_payload(
            m, "keys", Payload({**m.payloads["keys"].tensors, "9": m.payloads["keys"].tensors["1"]}, 0)
        ),
        "the key list has 9, which is no client of round 1",
    ),
    "a key twice": (
        "key list",
        lambda m: with_payload(
            m, "keys", Payload({**m.payloads["keys"].tensors, "2": m.payloads["keys"].tensors["1"]}, 0)
        ),
        "the key list has a key twice",
    ),
    "too few keys": (
        "key list",
        lambda m: with_payload(
            m, "keys", Payload({n: m.payloads["keys"].tensors[n] for n in ("0", "1", "2")}, 0)
        ),
        "3 clients have keys, and 4 are needed",
    ),
    "the steps mixed up": (
        "key list",
        lambda m: replace(m, step="survivors"),
        "the server sends the survivors, and the key list comes next",
    ),
    "a changed share": (
        "share list",
        lambda m: with_payload(m, "shares", first_byte(m.payloads["shares"])),
        "cannot be decrypted",
    ),
    "a foreign share": (
        "share list",
        lambda m: with_payload(
            m, "shares", Payload({**m.payloads["shares"].tensors, "2": m.payloads["shares"].tensors["1"]}, 0)
        ),
        "cannot be decrypted",
    ),
    "too few shares": (
        "share list",
        lambda m: with_payload(
            m, "shares", Payload({n: m.payloads["shares"].tensors[n] for n in ("1", "2")}, 0)
        ),
        "3 clients sent shares, and 4 are needed",
    ),
    "a sum of one": ("survivors", survivors(0), "1 clients survive, and 4 are needed"),
    "a sum without me": ("survivors", survivors(1, 2, 3, 4), "the survivors are without this client"),
    "strangers": ("survivors", survivors(0, 1, 2, 3, 7), "others than the clients that have sent shares"),
    "one twice": ("survivors", survivors(0, 1, 2, 3, 3), "others than the clients that have sent shares"),
    "no list": (
        "survivors",
        lambda m: with_payload(m, "clients", Payload({"survivors": torch.zeros(5)}, 0)),
        "the survivors are no list of clients",
    ),
    "another round": ("survivors", lambda m: replace(m, round=2), "round 2 has no masks at this client"),
}


def test_a_key_that_is_not_the_same_for_all_is_noticed_by_all(masked: MakeMasked, capfd: Line) -> None:
    """The keys of shares and masks depend on all public keys of the round."""
    over = masked()

    def other(message: MaskMessage) -> MaskMessage:
        tensors = {**message.payloads["keys"].tensors, "1": other_keys(message, "1")}
        return with_payload(message, "keys", Payload(tensors, 0))

    refusals = driven(over, "key list", other)
    assert len(refusals) == 5
    assert all(re.search(r"the shares of client \d cannot be decrypted", refusal) for refusal in refusals)
    assert "0 of 5 clients sent masked updates" in capfd.readouterr().err


@pytest.mark.parametrize("lie", LIES)
def test_a_client_answers_no_message_that_an_honest_server_does_not_send(
    lie: str, masked: MakeMasked
) -> None:
    step, change, reason = LIES[lie]
    refusals = driven(masked(), step, change)
    assert len(refusals) == 1
    assert reason in refusals[0]


# --- one model for all ---


@pytest.mark.parametrize("chosen", [{}, {"codec": Codec(down=[Quantisation(8)])}, {"algorithm": Scaffold()}])
def test_a_server_that_sends_one_client_another_model_is_noticed_before_anything_is_masked(
    chosen: dict[str, Any], masked: MakeMasked, tmp_path: Path
) -> None:
    """Model inconsistency (arXiv 2111.07380): models can be such that one client's update is the sum."""
    over = masked(secure_setup(**chosen))
    over.run(2)  # with one model the hashes are equal, at first contact and with deltas
    assert over.server.met == dict.fromkeys(range(5), 2)
    act = over._tapped(0)

    def received(content: bytes) -> bytes:
        message = from_bytes(content)
        if not isinstance(message, Broadcast):
            return act(content)
        values = {n: t.clone() for n, t in message.payloads["own"].tensors.items()}
        next(iter(values.values())).view(torch.uint8).flatten()[0] ^= 1
        return act(to_bytes(with_payload(message, "own", replace(message.payloads["own"], tensors=values))))

    over.grid.nodes[NODE].act = received
    hidden = over.server.hash_sent
    over.server.hash_sent = lambda: b""  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlight.federation.secure.mask_server.hash_of_model", lambda content: b"")
        over.run(3)
    over.server.hash_sent = hidden  # type: ignore[method-assign]
    assert len(over.refusals) == 5
    assert all(
        re.fullmatch(r"client \d received another model than this one: nothing is masked", refusal)
        for refusal in over.refusals
    )


def test_a_client_that_names_another_model_drops_out(masked: MakeMasked, tmp_path: Path, capfd: Line) -> None:
    over = masked()
    over.change(1, "Broadcast", lambda m: with_payload(m, "keys", first_byte(m.payloads["keys"])))
    over.run(1)
    assert same(over.server, plain_server(secure_setup(), tmp_path / "plain", 5, 1, {0, 2, 3, 4}))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(
        "sent a message that says that it received another model than that of the round: refused"
    )


# --- public keys that the nodes sign ---


@pytest.fixture
def signed(tmp_path: Path, masked: MakeMasked) -> MaskedToys:
    """A federation whose agreement lists the keys of its nodes."""
    signers = [Signer(write_key(tmp_path / f"node{client}.key")) for client in range(5)]
    fingerprints = tuple(signer.fingerprint for signer in signers)
    return masked(secure_setup(fields={"signers": fingerprints}), signers=signers)


def test_signed_keys_change_no_bit_and_are_counted(signed: MaskedToys, tmp_path: Path) -> None:
    signed.run(2)
    plain = plain_server(signed.setup, tmp_path / "plain", 5, 2, {*range(5)})
    assert same(signed.server, plain)
    assert signed.server.ledger.rows() == plain.ledger.rows()
    keys = from_bytes(signed.received[0][0]).payloads["keys"]
    assert keys.bytes == KEYS_BYTES + SIGNATURE_BYTES


def replacing(change: Callable[[int, bytes], bytes]) -> Callable[[Any], Any]:
    """Changes the keys of all clients but the first in a key list, as a machine in the middle would."""

    def replaced(message: MaskMessage) -> MaskMessage:
        tensors = {
            name: tensor
            if name == "0"
            else torch.frombuffer(bytearray(change(int(name), tensor.numpy().tobytes())), dtype=torch.uint8)
            for name, tensor in message.payloads["keys"].tensors.items()
        }
        return with_payload(message, "keys", Payload(tensors, 0))

    return replaced


def own_keys(content: bytes) -> bytes:
    """Keys of the server's own, with the hash of the model that the client sent."""
    return KeyPair().public + KeyPair().public + content[64:KEYS_BYTES]


def test_without_signatures_keys_that_a_server_puts_in_get_shares_that_it_can_read(
    masked: MakeMasked,
) -> None:
    """A machine in the middle: from the answer of client 0 it has the seed of that client's own mask."""
    over, pairs = masked(), {client: (KeyPair(), KeyPair()) for client in (1, 2, 3, 4)}
    put_in = {client: both[0].public + both[1].public for client, both in pairs.items()}
    assert not driven_first(over, replacing(lambda client, content: put_in[client] + content[64:]))
    keys, shares = map(from_bytes, over.received[0][:2])
    own = keys.payloads["keys"].tensors["own"].numpy().tobytes()
    session = transcript("toy", 1, {0: own, **{k: public + own[64:] for k, public in put_in.items()}})
    read = []
    for client, (_, pair) in pairs.items():
        token = shares.payloads["shares"].tensors[str(client)].numpy().tobytes()
        plain = unseal(pair.agree(own[32:64], "shares", session, 0, client), token)
        read.append(plain[-SHARE_BYTES:])
    commitment = keys.payloads["commitments"].tensors["own"].numpy().tobytes()
    assert commit(combine(read)) == commitment


def test_keys_that_a_server_puts_in_are_noticed_where_nodes_sign(signed: MaskedToys) -> None:
    refusals = driven_first(
        signed, replacing(lambda client, content: own_keys(content) + content[KEYS_BYTES:])
    )
    assert refusals == ["in the key list client 1 has public keys whose signature is invalid"]


def driven_first(over: MaskedToys, change: Callable[[Any], Any]) -> list[str]:
    """The first client's refusals in a round in which its key list is changed."""
    refusals: list[str] = []
    act = over._tapped(0)

    def received(content: bytes) -> bytes:
        changes = step_of(content) == "key list"
        answer: bytes = act(to_bytes(change(from_bytes(content))) if changes else content)
        if changes:
            refusals.extend(over.refusals)
        return answer

    over.grid.nodes[NODE].act = received
    over.run(1)
    return refusals


def test_keys_that_another_key_signs_are_refused(signed: MaskedToys, tmp_path: Path) -> None:
    stranger = Signer(write_key(tmp_path / "stranger.key"))

    def put_in(client: int, content: bytes) -> bytes:
        keys = own_keys(content)
        return keys + stranger.sign(signed_content("toy", 1, client, keys))

    (refusal,) = driven_first(signed, replacing(put_in))
    assert refusal == (
        "in the key list client 1 has public keys that are signed by another key than that of the agreement"
    )


@pytest.mark.parametrize("whose", [("toy", 2, 1), ("toy", 1, 2), ("other", 1, 1)])
def test_a_signature_holds_for_one_client_in_one_round_of_one_cell(
    whose: tuple[str, int, int], signed: MaskedToys
) -> None:
    def earlier(client: int, content: bytes) -> bytes:
        if client != 1:
            return content
        keys = own_keys(content)
        return keys + signed.signers[1].sign(signed_content(*whose, keys))

    (refusal,) = driven_first(signed, replacing(earlier))
    assert refusal == "in the key list client 1 has public keys whose signature is invalid"


def test_a_node_whose_signature_is_invalid_drops_out(signed: MaskedToys, tmp_path: Path, capfd: Line) -> None:
    signed.change(2, "Broadcast", lambda m: with_payload(m, "keys", first_byte(m.payloads["keys"])))
    signed.run(1)
    assert same(signed.server, plain_server(signed.setup, tmp_path / "plain", 5, 1, {0, 1, 3, 4}))
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"fedlight: client 2 (node {NODE + 2}) sent a message that has public keys whose signature is "
        "invalid: refused"
    )


def test_keys_of_nodes_that_cannot_sign_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    for path, reason in (
        (tmp_path / "absent", "cannot be read: No such file or directory"),
        (tmp_path / "text", "is no private key of OpenSSH without a passphrase"),
        (write_key(tmp_path / "short", ec.SECP256R1()), "is no ECDSA key on P-384"),
    ):
        with pytest.raises(BadInput, match=reason):
            Signer(path)


def test_an_institution_signs_with_the_key_of_the_agreement_alone(signed: MaskedToys, tmp_path: Path) -> None:
    secure = signed.setup.secure
    assert secure
    with pytest.raises(BadInput, match=r'add key="/path/to/node.key" to --node-config'):
        make_masking(secure, 0, None)
    with pytest.raises(BadInput, match=r"the agreement lists SHA256:.* for client 1"):
        make_masking(secure, 1, tmp_path / "node0.key")
    make_masking(secure, 1, tmp_path / "node1.key")
    make_masking(secure_setup().secure, 1, None)


def test_a_round_is_unmasked_once(masked: MakeMasked) -> None:
    """Two sums of one round with different clients would differ by the update of one of them."""
    over = masked()
    received: list[bytes] = []
    act = over._tapped(0)
    over.grid.nodes[NODE].act = lambda content: (received.append(content), act(content))[1]
    over.run(1)
    broadcast, *_, last = received
    institution = over.institutions[0]
    assert institution.answer(last) == over.received[0][-1], "the same message gets the same bytes"
    institution.answer(broadcast)  # the server starts the round again
    fewer = to_bytes(survivors(0, 1, 2, 3)(from_bytes(last)))
    with pytest.raises(Damaged, match="round 1 was unmasked already, and these are other survivors"):
        institution.answer(fewer)


def test_a_server_that_starts_a_round_again_gets_the_same_update_under_new_masks(
    masked: MakeMasked, tmp_path: Path
) -> None:
    over = masked()
    answers = [
        over.institutions[message.client].answer(to_bytes(message)) for message in over.server.start_round()
    ]
    messages = [from_bytes(answer) for answer in answers]
    over.server.reset()
    assert {message.step for message in messages} == {"keys"}
    over.run(1)
    again = from_bytes(over.received[0][0])
    assert not again.payloads["keys"].tensors["own"].equal(messages[0].payloads["keys"].tensors["own"])
    assert same(over.server, plain_server(secure_setup(), tmp_path / "plain", 5, 1, {*range(5)}))


def test_a_restarted_node_drops_out_of_the_round_and_takes_part_in_the_next(
    masked: MakeMasked, tmp_path: Path
) -> None:
    over = masked()
    secure = over.setup.secure
    assert secure

    def restart(content: bytes) -> bytes:
        if step_of(content) == "share list":
            masking = over.institutions[4].masking
            assert masking
            masking._current = None  # what is in memory alone is gone
        return over._tapped(4)(content)

    over.grid.nodes[NODE + 4].act = restart
    over.run(1)
    assert over.refusals == ["round 1 has no masks at this client, which may have been restarted"]
    assert over.server.met == dict.fromkeys(range(4), 1)
    over.grid.nodes[NODE + 4].act = over._tapped(4)
    over.run(2)
    assert over.server.met == dict.fromkeys(range(5), 2)


def test_no_secret_is_on_the_disk_or_in_a_message(masked: MakeMasked) -> None:
    over = masked()
    sessions = []
    begin = over.institutions[0].masking.begin

    def kept(*arguments: Any) -> MaskMessage:
        message = begin(*arguments)
        sessions.append(over.institutions[0].masking._current)
        return message

    object.__setattr__(over.institutions[0].masking, "begin", kept)
    over.run(1)
    (session,) = sessions
    secrets = [pair.secret for pair in session.keys] + [*session.seeds.values()]
    written = [path.read_bytes() for path in over.institutions[0].folder.rglob("*") if path.is_file()]
    sent = [content for contents in over.received.values() for content in contents]
    assert len(secrets) == 3, "two keys, and one seed for both slices"
    assert not [secret for secret in secrets if any(secret in content for content in written + sent)]


def test_the_messages_have_the_counted_sizes(masked: MakeMasked) -> None:
    over = masked()
    over.run(1)
    for contents in over.received.values():
        keys, shares, update, revealed = map(from_bytes, contents)
        assert keys.payloads["keys"].bytes == KEYS_BYTES
        assert {t.numel() for t in shares.payloads["shares"].tensors.values()} == {token_bytes(1)}
        assert update.payloads["own"].bytes == 4 * (2 + 8)
        assert revealed.payloads["seeds"].bytes == 20 * 5
        assert revealed.payloads["keys"].bytes == 0


def test_the_sum_of_masked_vectors_is_that_of_plain_ones_after_unmasking(masked: MakeMasked) -> None:
    """From what the server received alone: it subtracts the masks, and integers are left that clients had."""
    over = masked()
    (outcome,) = federate(over.server, over.transport, 1)
    masks = over.server._open.masks
    assert masks
    assert outcome.reports == 5
    for slice_, params in (("own", 8), ("shared", 3)):
        received, plain = np.zeros(2 + params, np.uint64), np.zeros(2 + params, np.int64)
        for client, contents in over.received.items():
            update = from_bytes(contents[2])
            received += unpack_integers(update.payloads[slice_].tensors[INTEGERS], 32, 2 + params)
            folder = over.institutions[client].folder / "answers"
            for path in folder.glob("*.safetensors"):
                message = from_bytes(path.read_bytes())
                if isinstance(message, Update):
                    vector = unpack_integers(message.payloads[slice_].tensors[INTEGERS], 32, 2 + params)
                    plain += to_signed(vector, 32)
        assert to_signed(received - masks[slice_], FIXED.modulus_bits).tolist() == plain.tolist()
        assert to_signed(received, FIXED.modulus_bits).tolist() != plain.tolist()


MUTATIONS = 10  # of each message to a node


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a message with some of them changed, cut off or repeated."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : place + rng.randint(1, 40)]
        elif kind == 2:
            changed[place:place] = changed[place : place + rng.randint(1, 40)]
        elif digits := [i for i in range(min(len(changed), 2000)) if chr(changed[i]).isdigit()]:
            changed[rng.choice(digits)] = ord(rng.choice("0123456789-"))
        changed = changed or bytearray(1)
    return bytes(changed)


def test_mutated_messages_are_refused_in_one_line_and_end_nothing(masked: MakeMasked, capfd: Line) -> None:
    """Both ways: nodes and server read changed messages of all steps, over rounds that go on."""
    over, rng = masked(clients=3), random.Random(3)
    acts = {client: over._tapped(client) for client in range(3)}

    def hostile(client: int) -> Callable[[bytes], bytes]:
        def answer(content: bytes) -> bytes:
            for _ in range(MUTATIONS if b"MaskMessage" in content else 0):
                acts[client](mutated(content, rng))
            answered = acts[client](content)
            return mutated(answered, rng) if client == 2 and rng.random() < 0.5 else answered

        return answer

    for client in range(3):
        over.grid.nodes[NODE + client].act = hostile(client)
    over.run(8)
    assert len(over.refusals) > 200
    assert not [refusal for refusal in over.refusals if "\n" in refusal]
    assert all(line.startswith("fedlight: ") for line in capfd.readouterr().err.splitlines())
    assert over.server.round == 8
