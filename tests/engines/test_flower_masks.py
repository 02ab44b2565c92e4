"""Secure aggregation between five institutions over TLS: failing nodes, and what the server receives."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import Cell, invoke
from consortium import Consortium, consortium_of, missing, until, update_in
from scipy.stats import chisquare

from fedlight import deploy
from fedlight.experiment.attack import Attacker
from fedlight.experiment.finished import open_cell
from fedlight.federation.messages import Update, from_bytes
from fedlight.federation.secure.integers import to_signed, unpack_integers
from fedlight.federation.secure.secure_sum import INTEGERS
from fedlight.federation.secure.signatures import SIGNATURE_BYTES

pytest.importorskip("flwr")

pytestmark = pytest.mark.slow

COMMON = ["name=masks", "logger=none", "data.limit=100", "rounds=5", "epochs=40", "optimizer.lr=0.003"]
COMMON += ["clients=5"]
COMMON += ["evaluation.samples=0", "evaluation.grid=0", "aggregation=secure", "aggregation.threshold=3"]
COMPLETE = 2  # rounds in which nobody fails
STOPS = {2: "5 Broadcast", 3: "3 key list", 4: "3 share list"}
"""Client: the message at which its node is killed, before its keys, before its shares, and after them."""
BITS = 32


@dataclass(frozen=True)
class Masked:
    """A federation of five rounds that ended, and what its nodes sent."""

    consortium: Consortium
    app: Path

    def updates(self, client: int) -> dict[int, Update]:
        """Round: the masked update that the SuperLink received of a client."""
        requests = self.consortium.sent(self.app, f"node{client}").requests()
        updates = [update for request in requests if (update := update_in(request))]
        return {update.round: update for update in updates}

    def kept(self, client: int) -> dict[int, Update]:
        """Round: the update before its masks, of the last rounds, which the institution keeps for itself."""
        memory = self.consortium.folder / f"node{client}" / "memory"
        messages = [from_bytes(path.read_bytes()) for path in memory.rglob("answers/*.safetensors")]
        return {message.round: message for message in messages if isinstance(message, Update)}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Masked]:
    if absent := missing():
        pytest.skip(absent)
    folder = tmp_path_factory.mktemp("masks")
    app = folder / "cell" / "app"
    app.parent.mkdir()
    with consortium_of(folder / "all", 5) as consortium:
        nodes = ",".join(consortium.fingerprint(f"node{client}") for client in range(5))
        typed = [*COMMON, "transport.timeout=200", f"transport.nodes=[{nodes}]"]
        assert invoke("init", str(app), *typed, main=deploy.main) == 0
        for client in range(5):
            stops_at = STOPS.get(client, "")
            consortium.start_node(app, client, f"node{client}", heartbeat=10, stops_at=stops_at)
        consortium.submit(app)
        for client in (3, 4, 2):
            until(consortium.sent(app, f"node{client}").has_stopped, 200)
            consortium.kill(f"node{client}")
        assert consortium.result(app)["status"] == "completed"
        for client in (0, 1):
            consortium.end(f"node{client}")
        yield Masked(consortium, app)


def test_the_sum_is_that_of_the_survivors_and_a_round_of_too_few_is_lost(masked: Masked) -> None:
    rows = masked.consortium.rows(masked.app, "rounds.csv")
    assert [int(row["reports"]) for row in rows] == [5, 5, 3, 3, 0]
    assert [bool(row["train_loss"]) for row in rows] == [True, True, True, True, False]
    lost = "round 5: the round is lost: 2 of 5 clients sent keys, and 3 are needed; the global model stays"
    log = masked.consortium.server_log()
    assert lost in log
    assert re.search(r"client 3 \(node \d+\) did not answer \(5\); it drops out of the round", log)
    sent = {client: sorted(masked.updates(client)) for client in range(5)}
    assert sent == {0: [1, 2, 3, 4], 1: [1, 2, 3, 4], 2: [1, 2, 3, 4], 3: [1, 2], 4: [1, 2]}


def test_rounds_in_which_nobody_fails_have_the_bits_of_one_process(
    masked: Masked, finished: Callable[..., Cell]
) -> None:
    plain = finished(*COMMON[2:], f"rounds={COMPLETE}", "transport=inline")
    signatures = 5 * (1 + 5) * SIGNATURE_BYTES  # each client sends its own, and gets those of all
    rows = masked.consortium.rows(masked.app, "rounds.csv")[:COMPLETE]
    for number, (row, expected) in enumerate(zip(rows, plain.rows("rounds.csv"), strict=True), 1):
        for column in ("train_loss", "params_down", "params_up", "reports"):
            assert row[column] == expected[column], column
        assert int(row["bytes_cumulative"]) == int(expected["bytes_cumulative"]) + number * signatures


def test_what_the_superlink_received_of_one_client_is_uniform(masked: Masked) -> None:
    """Chi-square over all bytes of the masked vectors, of each client by itself."""
    for client in range(5):
        counts = np.zeros(256)
        for update in masked.updates(client).values():
            assert (update.num_examples, update.loss) == (0, None)
            for payload in update.payloads.values():
                counts += np.bincount(payload.tensors[INTEGERS].numpy(), minlength=256)
        assert counts.sum() > 400_000
        assert chisquare(counts).pvalue > 1e-6, client


def test_a_masked_update_has_nothing_in_common_with_the_update(masked: Masked) -> None:
    compared = 0
    for client in (0, 1):
        received = masked.updates(client)
        for round_, update in masked.kept(client).items():
            if round_ not in received:
                continue
            pairs = []
            for slice_, payload in update.payloads.items():
                count = 2 + payload.params
                vectors = [payload.tensors[INTEGERS], received[round_].payloads[slice_].tensors[INTEGERS]]
                pairs.append([to_signed(unpack_integers(v, BITS, count), BITS)[2:] for v in vectors])
            plain, sent = (np.concatenate(side).astype(float) for side in zip(*pairs, strict=True))
            assert plain.std() > 0
            assert abs(np.corrcoef(plain, sent)[0, 1]) < 5 / len(plain) ** 0.5
            compared += 1
    assert compared >= 2


def test_the_membership_attack_on_what_the_superlink_received_is_at_chance(
    masked: Masked, finished: Callable[..., Cell]
) -> None:
    """The clients overfit, so that there is something to see in their updates before the masks."""
    plain = finished(*COMMON[2:], f"rounds={COMPLETE}", "transport=inline")
    attacker = Attacker(open_cell(plain.folder), images=1000, clients=5, seed=0)
    received = {client: masked.updates(client)[COMPLETE] for client in range(5)}
    auc: dict[str, list[float]] = {"before its mask": [], "masked update": [], "sum of 5 clients": []}
    for attack in attacker._attack_updates(received):
        (kind,) = (kind for kind in auc if kind in attack.observed)
        auc[kind].append(attack.summary(1e-5)["auc"][0])
    single, tapped, total = (sum(values) / len(values) for values in auc.values())
    assert len(auc["masked update"]) == 5
    assert abs(tapped - 0.5) < 0.15  # more than four standard errors
    assert single > 0.65
    assert total < single
