"""An institution answers once a round, in order, and only as agreed, whatever its server sends."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from toy import FULL, PARTIAL, federate, toy_server, toy_setup, toy_site

from fedlight.deployment import answers
from fedlight.deployment.institution import Institution
from fedlight.deployment.terms import Terms
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client import ClientSetup
from fedlight.federation.cohort import Participation
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.messages import (
    Broadcast,
    Evaluation,
    Payload,
    Scores,
    Update,
    from_bytes,
    to_bytes,
)
from fedlight.federation.method import Method, Split
from fedlight.federation.noise import SecretNoise
from fedlight.federation.server import Server
from fedlight.runtime.errors import Damaged

ROUNDS = 4
WARM = PARTIAL.model_copy(update={"warm_start": 2})


@dataclass
class Attacked:
    """Client 1, and the messages of a server that follows no rule."""

    setup: ClientSetup
    institution: Institution

    def broadcast(self, round_: int, shift: float = 0.0, **more: Any) -> bytes:
        """The broadcast of a round, with the values of the first model moved by `shift`."""
        method = self.setup.method.in_round(round_, self.setup.slices.names)
        message = Broadcast("toy", round_, 1, round_ - 1, tuple(method.uplink), False, self.payloads(shift))
        if round_ - 1 > self.setup.method.warm_start:
            message = replace(message, payloads={n: message.payloads[n] for n in method.downlink})
        return to_bytes(replace(message, **more))

    def evaluation(self, round_: int, shift: float = 0.0, draw: bool = True, **more: Any) -> bytes:
        message = Evaluation("toy", round_, 1, 0, draw, self.payloads(shift))
        return to_bytes(replace(message, **more))

    def payloads(self, shift: float) -> dict[str, Payload]:
        slices, first = self.setup.slices, self.setup.first
        return {
            name: Payload.plain({n: t + shift for n, t in slices.select([name], first).items()})
            for name in slices.names
        }

    def answer(self, content: bytes) -> Any:
        return from_bytes(self.institution.answer(content))

    def files(self) -> dict[str, bytes]:
        """Everything that the institution keeps."""
        folder = self.institution.folder
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make_institution(
    setup: ClientSetup, folder: Path, client: int = 1, participation: Participation | None = None
) -> Institution:
    terms = Terms(
        setup.method,
        tuple(setup.slices.names),
        ROUNDS,
        participation or Participation(2, 1.0, 0.0, setup.seed),
        draws_after=lambda round_: round_ in (2, ROUNDS),
    )
    memory = folder / "toy" / "checkpoint"
    return Institution("toy", client, toy_site(setup, memory), memory, terms)


MakeAttacked = Callable[..., Attacked]


@pytest.fixture
def attacked(tmp_path: Path) -> MakeAttacked:
    def make(method: Method = WARM, participation: Participation | None = None, **more: Any) -> Attacked:
        setup = toy_setup(method, **more)
        return Attacked(setup, make_institution(setup, tmp_path / "node", participation=participation))

    return make


def leaving(update: Update) -> set[str]:
    return set(update.payloads)


def test_private_slices_never_leave_after_the_warm_start(attacked: MakeAttacked) -> None:
    node = attacked()
    left = [leaving(node.answer(node.broadcast(round_))) for round_ in (1, 2, 3, 4)]
    assert left == [{"own", "shared"}, {"own", "shared"}, {"shared"}, {"shared"}]
    before = node.files()
    for round_ in (1, 2):
        with pytest.raises(Damaged, match=f"the server is in round {round_}.* has answered round 4"):
            node.answer(node.broadcast(round_))
    with pytest.raises(Damaged, match="PARTIAL does not let own leave in round 4"):
        node.answer(node.broadcast(4, uplink=("own", "shared")))
    assert node.files() == before, "neither memory nor answers are lost by such messages"


@pytest.mark.parametrize("round_", [-1, 0, ROUNDS + 1, 999, 10**30])
def test_a_round_outside_the_agreement_is_refused_and_changes_nothing(
    round_: int, attacked: MakeAttacked
) -> None:
    node = attacked(FULL)
    schema = "no message of a federation .round: Input should be"
    with pytest.raises(Damaged, match=f"the agreement has rounds 1 to 4|{schema}"):
        node.answer(node.broadcast(1, round=round_))
    assert node.answer(node.broadcast(1)).round == 1


def test_repeated_broadcasts_of_a_round_get_one_draw_of_noise(attacked: MakeAttacked) -> None:
    noise = GaussianMechanism(1.0, 1.0, 2, 2.0, True, None, SecretNoise())
    node = attacked(
        FULL, participation=Participation(2, 1.0, 0.0, 5, poisson=True, secret=True), privacy=noise
    )
    first = node.institution.answer(node.broadcast(1))
    for attempt in range(1, 40):
        with pytest.raises(
            Damaged, match="round 1 was answered already, and this is another broadcast of it"
        ):
            node.answer(node.broadcast(1, shift=attempt / 100))
    assert node.institution.answer(node.broadcast(1)) == first


def test_a_restarted_node_repeats_the_same_bytes(attacked: MakeAttacked) -> None:
    noise = GaussianMechanism(1.0, 1.0, 2, 2.0, True, None, SecretNoise())
    node = attacked(FULL, privacy=noise)
    given = [node.institution.answer(node.broadcast(round_)) for round_ in (1, 2)]
    again = replace(node, institution=make_institution(node.setup, node.institution.folder.parents[1]))
    assert [again.institution.answer(again.broadcast(round_)) for round_ in (1, 2)] == given


def test_rounds_are_answered_in_order(attacked: MakeAttacked) -> None:
    node = attacked(FULL)
    node.answer(node.broadcast(3, previous=0))
    with pytest.raises(Damaged, match="round 3 was answered already, and round 2 comes before it"):
        node.answer(node.broadcast(2, previous=0))
    with pytest.raises(Damaged, match=r"move .*node.toy elsewhere"):
        node.answer(node.broadcast(1))
    assert node.answer(node.broadcast(4)).round == 4


def test_a_node_starts_again_after_its_folder_is_moved(attacked: MakeAttacked) -> None:
    node = attacked()
    for round_ in (1, 2, 3):
        node.answer(node.broadcast(round_))
    with pytest.raises(Damaged) as refusal:
        node.answer(node.broadcast(1))
    named = Path(str(refusal.value).split("move ")[1].split(" elsewhere")[0])
    named.rename(named.with_name("kept"))
    assert node.answer(node.broadcast(1)).round == 1  # by the same process
    assert {path.name[:5] for path in (named.with_name("kept") / "checkpoint/clients/000001").iterdir()} == {
        "r0001",
        "r0002",
        "r0003",
    }


def test_under_a_split_only_the_slices_of_the_round_leave() -> None:
    slices, participation = ("encoder", "bottleneck", "decoder"), Participation(2, 1.0, 0.0, 5)
    split = Split(either=("encoder", "decoder"), coin="bottleneck")
    method = FULL.model_copy(update={"split": split}).resolve(slices)
    terms = Terms(method, slices, ROUNDS, participation, draws_after=lambda round_: False)
    seen = set()
    for round_ in range(1, ROUNDS + 1):
        agreed = participation.draw(method, round_)[1][1].uplink
        seen.add(agreed)
        message = Broadcast("toy", round_, 1, round_ - 1, agreed, False, {})
        terms.check_broadcast(message)
        for other in set(slices).difference(agreed):
            with pytest.raises(Damaged, match=f"does not let {other} leave in round {round_}"):
                terms.check_broadcast(replace(message, uplink=(*agreed, other)))
    assert len(seen) > 1


def test_a_client_outside_the_cohort_does_not_answer(attacked: MakeAttacked) -> None:
    participation = Participation(2, 0.5, 0.0, 5)
    node = attacked(FULL, participation)
    for round_ in range(1, ROUNDS + 1):
        if 1 in participation.draw(FULL, round_)[0]:
            assert node.answer(node.broadcast(round_, previous=0)).round == round_
        else:
            with pytest.raises(Damaged, match=f"client 1 does not take part in round {round_}"):
                node.answer(node.broadcast(round_, previous=0))


def test_under_a_secret_cohort_a_client_answers_in_any_round(attacked: MakeAttacked) -> None:
    node = attacked(FULL, Participation(2, 1e-6, 0.0, 5, poisson=True, secret=True))
    for round_ in range(1, ROUNDS + 1):
        assert node.answer(node.broadcast(round_)).round == round_


def test_a_broadcast_with_other_slices_than_the_downlink_is_refused(attacked: MakeAttacked) -> None:
    node = attacked(PARTIAL)
    node.answer(node.broadcast(1))
    before = node.files()
    with pytest.raises(Damaged, match="contains own, shared instead of shared"):
        node.answer(node.broadcast(2, payloads=node.payloads(1.0)))
    for wrong, reason in (
        ({"drops_out": True}, "tells the client to drop out"),
        ({"previous": 2}, "cannot have taken part in round 2 of 1"),
        ({"previous": -1}, "previous: Input should be greater"),
    ):
        with pytest.raises(Damaged, match=reason):
            node.answer(node.broadcast(2, **wrong))
    assert node.files() == before


def test_scores_leave_only_after_the_agreed_rounds(attacked: MakeAttacked) -> None:
    node = attacked()
    for round_ in (0, 5, 999):
        with pytest.raises(Damaged, match="the agreement has rounds 1 to 4"):
            node.answer(node.evaluation(round_))
    for round_ in (1, 3):
        with pytest.raises(Damaged, match="does not provide for images from a client's model after round"):
            node.answer(node.evaluation(round_))
    for round_ in (1, 2, 3):
        with pytest.raises(Damaged, match="does not provide for the fingerprint"):
            node.answer(node.evaluation(round_, draw=False))
    assert isinstance(node.answer(node.evaluation(2)), Scores)
    for round_ in (1, 2, 3, 4):
        node.answer(node.broadcast(round_))
    with pytest.raises(Damaged, match="the server is in round 2"):
        node.answer(node.evaluation(2, shift=0.5))
    scores = node.answer(node.evaluation(4, previous=4))
    assert set(scores.payloads) == {"grid"}
    assert not node.answer(node.evaluation(4, draw=False, previous=4)).payloads
    for wrong, reason in (
        ({"previous": 5}, "cannot have taken part in round 5 of 4"),
        ({"payloads": {"other": Payload.plain({})}}, "contains other instead of own, shared"),
    ):
        with pytest.raises(Damaged, match=reason):
            node.answer(node.evaluation(4, **wrong))


def test_at_most_two_models_are_scored_after_a_round(attacked: MakeAttacked) -> None:
    node = attacked()
    given = [node.institution.answer(node.evaluation(2, shift=shift)) for shift in (0.0, 0.5)]
    assert given[0] != given[1]
    for attempt in range(2, 40):
        with pytest.raises(Damaged, match="images of 2 models left after round 2 already"):
            node.answer(node.evaluation(2, shift=attempt / 7))
    assert [node.institution.answer(node.evaluation(2, shift=shift)) for shift in (0.0, 0.5)] == given


def test_a_method_that_evaluates_the_global_model_answers_no_evaluation(attacked: MakeAttacked) -> None:
    node = attacked(FULL)
    with pytest.raises(Damaged, match="FULL requests scores from no client"):
        node.answer(node.evaluation(2))


class Killed(BaseException):
    """A kill at an instant."""


def test_a_process_killed_at_any_step_gives_a_round_one_answer(
    attacked: MakeAttacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = GaussianMechanism(1.0, 1.0, 2, 2.0, True, None, SecretNoise())
    node = attacked(FULL, privacy=noise)
    real, left, until = os.fsync, set[bytes](), 0

    def fsync(file: int) -> None:
        nonlocal until
        until -= 1
        if until == 0:
            raise Killed
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    kills = 0
    for round_ in (1, 2):
        for fatal in range(1, 20):
            until = fatal
            try:
                left.add(node.institution.answer(node.broadcast(round_)))
            except Killed:
                kills += 1
        left.add(node.institution.answer(node.broadcast(round_)))
        assert len(left) == round_
    assert kills >= 4


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"1": 3}', b'{"x": {}}', b'{"1": {"update": [{}]}}'])
def test_nothing_leaves_when_the_record_is_damaged(content: bytes, attacked: MakeAttacked) -> None:
    node = attacked(FULL)
    node.answer(node.broadcast(1))
    (node.institution.folder / "answers.json").write_bytes(content)
    for round_ in (1, 2):
        with pytest.raises(Damaged, match=r"answers\.json is damaged, and without it nothing leaves"):
            node.answer(node.broadcast(round_))


@pytest.mark.parametrize("loss", ["is damaged", "is missing"])
def test_a_lost_answer_is_not_computed_again(loss: str, attacked: MakeAttacked) -> None:
    node = attacked(FULL)
    node.answer(node.broadcast(1))
    (path,) = (node.institution.folder / "answers").iterdir()
    if loss == "is missing":
        path.unlink()
    else:
        path.write_bytes(b"other")
    with pytest.raises(Damaged, match=f"{path.name} {loss}, and nothing leaves in its place: restore it"):
        node.answer(node.broadcast(1))
    assert node.answer(node.broadcast(2)).round == 2


def test_the_record_names_every_answer(attacked: MakeAttacked) -> None:
    node = attacked()
    requests = {round_: node.broadcast(round_) for round_ in (1, 2, 3)}
    left = {round_: node.institution.answer(content) for round_, content in requests.items()}
    noted = json.loads((node.institution.folder / "answers.json").read_text())
    assert noted == {
        str(round_): {
            "update": [{"request": answers.sha256(requests[round_]), "sha256": answers.sha256(left[round_])}]
        }
        for round_ in requests
    }
    kept = {path.read_bytes() for path in (node.institution.folder / "answers").iterdir()}
    assert kept == {left[2], left[3]}, "a server goes back by one round at most"


class Honest:
    """A server that restarts, and two institutions that answer its bytes."""

    def __init__(self, setup: ClientSetup, folder: Path) -> None:
        self.setup = setup
        (folder / "server").mkdir(parents=True)
        self.checkpoint = ServerCheckpoint(folder / "server", "toy")
        self.institutions = [make_institution(setup, folder / f"node{n}", client=n) for n in range(2)]
        self.away: set[int] = set()
        self.refused: list[tuple[int, int]] = []
        self.server = toy_server(setup)

    def exchange(self, broadcasts: Any) -> Iterator[Update]:
        for broadcast in broadcasts:
            if broadcast.client in self.away:
                self.server.withdraw(broadcast.client)
                continue
            try:
                yield from_bytes(self.institutions[broadcast.client].answer(to_bytes(broadcast)))
            except Damaged:
                self.refused.append((broadcast.round, broadcast.client))

    def evaluate(self, requests: Any) -> Iterator[Scores]:
        raise AssertionError("no scores")

    def run(self, rounds: int) -> None:
        for _ in federate(self.server, self, rounds):
            self.server.save(self.checkpoint, {})

    def answer_unheard(self) -> None:
        """Everybody answers the next round, and the server is killed before it stores anything."""
        for _ in self.exchange(self.server.start_round()):
            pass

    def restart(self, before: int | None = None) -> Server:
        self.server = toy_server(self.setup)
        self.server.resume(self.checkpoint, before)
        return self.server


@pytest.mark.parametrize("method", [FULL, PARTIAL, WARM], ids=["full", "partial", "warm"])
@pytest.mark.parametrize("back", [0, 1])
def test_a_server_that_restarts_or_goes_back_one_round_gets_the_same_bits(
    method: Method, back: int, tmp_path: Path
) -> None:
    plain = Honest(toy_setup(method), tmp_path / "plain")
    plain.run(ROUNDS)
    over = Honest(toy_setup(method), tmp_path / "over")
    over.run(2)
    over.answer_unheard()
    assert over.restart(before=2 if back else None).round == 2 - back
    over.run(ROUNDS)
    assert not over.refused
    assert all(tensor.equal(over.server.theta[name]) for name, tensor in plain.server.theta.items())


def test_a_server_that_repeats_a_round_with_another_model_continues(tmp_path: Path) -> None:
    over = Honest(toy_setup(PARTIAL), tmp_path / "over")
    over.run(2)
    over.answer_unheard()  # round 3
    assert over.restart(before=2).round == 1
    over.away = {0}  # so round 2 is of client 1 alone, and round 3 begins with another model
    over.run(2)
    over.away = set()
    over.run(ROUNDS)
    assert over.refused == [(3, 0), (3, 1)]
    assert over.server.met == {0: 4, 1: 4}


def test_a_server_that_lost_its_results_is_refused(tmp_path: Path) -> None:
    over = Honest(toy_setup(WARM), tmp_path / "over")
    over.run(3)
    kept = [sorted((i.folder / "clients").rglob("*.safetensors")) for i in over.institutions]
    over.server = toy_server(over.setup)
    over.run(3)
    assert over.refused == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert [sorted((i.folder / "clients").rglob("*.safetensors")) for i in over.institutions] == kept
