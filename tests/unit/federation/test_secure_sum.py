"""Secure aggregation: sums of integers are exact, whatever the order, and of enough clients."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from sums import FIXED, secure_server, secure_setup
from toy import FULL, PARTIAL, ToyData, federate, inline, toy_server, toy_setup, toy_site

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.client import ClientSetup, local_update
from fedlight.federation.cohort import Participation, Task
from fedlight.federation.mechanism import GaussianMechanism, update_norm
from fedlight.federation.messages import Payload, State, Update
from fedlight.federation.method import Method
from fedlight.federation.noise import SeededNoise
from fedlight.federation.secure.discrete_gaussian import draw_discrete_gaussian
from fedlight.federation.secure.fixed_point import FixedPoint
from fedlight.federation.secure.integers import pack_integers, to_signed, unpack_integers
from fedlight.federation.secure.mask_bytes import mask_traffic
from fedlight.federation.secure.secure_sum import (
    INTEGERS,
    DiscreteNoise,
    SecureAggregation,
    SliceSums,
)
from fedlight.federation.secure.sum_sizes import fewest_in_sum, fewest_that_unmask, group_slices
from fedlight.federation.slices import SliceMap
from fedlight.runtime.errors import BadInput, Damaged
from fedlight.runtime.system_random import SystemGenerator

MODULI = (16, 24, 32, 40, 48, 56, 64)


# --- integers ---


@given(st.sampled_from(MODULI), st.lists(st.integers(-(2**15), 2**15 - 1), max_size=9))
def test_bytes_are_the_integers_that_were_packed(bits: int, numbers: list[int]) -> None:
    values = np.array(numbers, np.int64)
    packed = pack_integers(values.view(np.uint64), bits)
    assert packed.numel() * 8 == bits * len(numbers)
    unpacked = unpack_integers(packed, bits, len(numbers))
    assert unpacked.tolist() == [number % 2**bits for number in numbers]
    assert to_signed(unpacked, bits).tolist() == numbers


@given(st.sampled_from(MODULI), st.integers(0, 2**63), st.integers(1, 20))
def test_a_sum_modulo_the_modulus_is_that_of_the_masked_numbers(bits: int, seed: int, clients: int) -> None:
    """Masks that add up to zero do not change the sum, in any order."""
    rng = np.random.default_rng(seed)
    largest = 2 ** (bits - 1) // clients
    plain = rng.integers(-largest, largest, (clients, 5))
    masks = rng.integers(0, 2**64, (clients, 5), dtype=np.uint64)
    masks[-1] = -masks[:-1].sum(axis=0, dtype=np.uint64)
    masked = [pack_integers(row.view(np.uint64) + mask, bits) for row, mask in zip(plain, masks, strict=True)]
    total = np.zeros(5, np.uint64)
    for client in rng.permutation(clients):
        total = total + unpack_integers(masked[client], bits, 5)
    assert to_signed(total, bits).tolist() == plain.sum(axis=0).tolist()


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(7, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int8),
        torch.zeros(2, 4, dtype=torch.uint8),
    ],
)
def test_other_bytes_than_those_of_the_vector_are_refused(packed: torch.Tensor) -> None:
    with pytest.raises(Damaged, match="instead of 8 bytes in uint8"):
        unpack_integers(packed, 32, 2)


# --- fixed point ---


def test_rounding_is_within_a_level_and_right_on_average() -> None:
    values = np.full(200_000, 0.3 / FIXED.scale + 5.0 / FIXED.scale)
    rounded = FIXED.round(values, np.random.default_rng(0))
    assert set(rounded) == {5, 6}
    assert abs(rounded.mean() - 5.3) < 0.01


def test_larger_changes_count_as_the_clip() -> None:
    rounded = FIXED.round(np.array([9.0, -70.0, 8.0, -8.0]), np.random.default_rng(0))
    assert rounded.tolist() == [FIXED.levels, -FIXED.levels, FIXED.levels, -FIXED.levels]
    assert FIXED.mean(rounded, 1).tolist() == [8.0, -8.0, 8.0, -8.0]


# --- noise ---


@pytest.mark.parametrize("deviation", [0.4, 3.0, 1000.0])
def test_noise_has_the_distribution_of_the_discrete_gaussian(deviation: float) -> None:
    for uniform in (np.random.default_rng(5), SystemGenerator()):
        drawn = draw_discrete_gaussian(deviation, 100_000, uniform)
        if deviation > 100:
            assert (
                kstest(
                    drawn + np.random.default_rng(1).random(len(drawn)) - 0.5, "norm", (0, deviation)
                ).pvalue
                > 1e-6
            )
            continue
        support = np.arange(-int(3 * deviation) - 1, int(3 * deviation) + 2)
        weights = np.exp(-(support**2) / (2 * deviation**2))
        everywhere = np.exp(-(np.arange(-60, 61) ** 2) / (2 * deviation**2)).sum()
        counts = np.array([(drawn == x).sum() for x in support])
        expected = weights / everywhere * len(drawn)
        outside = len(drawn) - expected.sum()
        assert chisquare([*counts, len(drawn) - counts.sum()], [*expected, outside]).pvalue > 1e-6


# --- a round ---


def test_the_decoded_mean_is_that_of_plain_federated_averaging_up_to_a_level(tmp_path: Path) -> None:
    plain, secure = toy_server(toy_setup(), clients=3), secure_server(secure_setup())
    losses = []
    for server, setup, place in ((plain, toy_setup(), "a"), (secure, secure_setup(), "b")):
        transport = inline(toy_site(setup, tmp_path / place))
        (outcome,) = federate(server, transport, 1)
        assert outcome.reports == 3
        losses.append(outcome.train_loss)
    assert losses[1] == pytest.approx(losses[0], abs=16 / FIXED.levels)
    for name, tensor in plain.theta.items():
        assert torch.allclose(tensor, secure.theta[name], atol=1.0 / FIXED.scale)
    assert not all(tensor.equal(secure.theta[name]) for name, tensor in plain.theta.items())


def test_the_sum_is_that_of_the_single_integers_exactly() -> None:
    setup = secure_setup()
    server = secure_server(setup)
    updates = [local_update(message, {}, setup)[0] for message in server.start_round()]
    sums = [SliceSums(setup.secure, setup.first) for _ in range(2)]
    for update in updates:
        sums[0].add(update)
    for update in reversed(updates):
        sums[1].add(update)
    for slice_ in ("own", "shared"):
        single = [
            unpack_integers(update.payloads[slice_].tensors[INTEGERS], 32, 2 + update.payloads[slice_].params)
            for update in updates
        ]
        total = np.sum([to_signed(vector, 32) for vector in single], axis=0)
        weights = [ToyData(client).num_examples for client in range(3)]
        assert total[0] == sum(weights)
        decoded = [sum_.decode(slice_) for sum_ in sums]
        assert decoded[0].weight == decoded[1].weight == sum(weights)
        flat = torch.cat([tensor.flatten() for tensor in decoded[0].values.values()])
        start = torch.cat([setup.first[name].flatten().double() for name in decoded[0].values])
        assert torch.equal(flat, start + torch.from_numpy(total[2:] / (sum(weights) * FIXED.scale)))
        assert all(t.equal(decoded[1].values[n]) for n, t in decoded[0].values.items())


def test_an_update_says_neither_its_size_nor_its_loss() -> None:
    setup = secure_setup()
    for message in secure_server(setup).start_round():
        update, _ = local_update(message, {}, setup)
        assert update
        assert (update.num_examples, update.loss) == (0, None)
        assert {name: [*payload.tensors] for name, payload in update.payloads.items()} == {
            "own": [INTEGERS],
            "shared": [INTEGERS],
        }


@pytest.mark.parametrize("method", [FULL, PARTIAL])
def test_the_order_of_arrival_changes_no_bit(method: Method, tmp_path: Path) -> None:
    servers = []
    for place in ("a", "b"):
        setup = secure_setup(method, algorithm=Scaffold())
        server, transport = secure_server(setup, 4), inline(toy_site(setup, tmp_path / place))
        for _ in range(2):
            updates = [*transport.exchange(server.start_round())]
            for update in updates if place == "a" else reversed(updates):
                server.receive(update)
            server.finish_round()
        servers.append(server)
    assert all(tensor.equal(servers[1].theta[name]) for name, tensor in servers[0].theta.items())
    assert all(tensor.equal(servers[1].state[name]) for name, tensor in servers[0].state.items())
    assert servers[0].ledger.rows() == servers[1].ledger.rows()


def test_control_variates_are_summed_in_the_same_way(tmp_path: Path) -> None:
    plain = toy_server(toy_setup(algorithm=Scaffold()), clients=3)
    setup = secure_setup(algorithm=Scaffold(), fields={"fixed": FixedPoint(64.0, 24, 40)})
    secure = secure_server(setup)
    for server, place in ((plain, "a"), (secure, "b")):
        own = setup if place == "b" else toy_setup(algorithm=Scaffold())
        for _ in federate(server, inline(toy_site(own, tmp_path / place)), 2):
            pass
    assert secure.state.keys() == plain.state.keys()
    for name, variate in plain.state.items():
        assert torch.allclose(variate, secure.state[name], atol=1e-4), name


class Halves(Participation):
    """Two of four clients report each slice."""

    def draw(self, method: Method, round_: int) -> tuple[list[int], list[Task]]:
        uplinks = [("own",), ("own",), ("shared",), ("shared",)]
        return [*range(4)], [Task(round_, client, uplink) for client, uplink in enumerate(uplinks)]


@pytest.mark.parametrize(
    ("arrived", "lost"), [({0, 1, 2}, False), ({0, 1}, False), ({0}, True), (set(), True)]
)
def test_a_round_of_too_few_clients_is_lost_and_the_next_goes_on(
    arrived: set[int], lost: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setup = secure_setup()
    server, transport = secure_server(setup), inline(toy_site(setup, tmp_path))
    before = dict(server.theta)
    for update in transport.exchange(server.start_round()):
        if update.client in arrived:
            server.receive(update)
    outcome = server.finish_round()
    assert outcome.reports == (0 if lost else len(arrived))
    assert all(tensor.equal(before[name]) for name, tensor in server.theta.items()) == lost
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == int(lost)
    if lost:
        assert f"round 1: the round is lost: {len(arrived)} of 3 clients reported, too few" in lines[0]
        assert outcome.train_loss is None
    for update in transport.exchange(server.start_round()):
        server.receive(update)
    assert server.finish_round().reports == 3


def test_a_slice_that_one_client_reports_is_not_summed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setup = secure_setup()
    server, transport = secure_server(setup, 4), inline(toy_site(setup, tmp_path))
    server.participation = Halves(4, 1.0, 0.0, 0)
    before = dict(server.theta)
    for update in transport.exchange(server.start_round()):
        if update.client != 0:
            server.receive(update)
    assert server.finish_round().reports == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "fedlight: round 1: slice own is lost: 1 client, and a sum has 2 at least"
    changed = {name for name, tensor in server.theta.items() if not tensor.equal(before[name])}
    assert changed == {"shared.weight", "shared.bias"}
    assert server.trained == {2, 3}


def test_a_sum_that_honest_clients_cannot_reach_is_refused() -> None:
    setup = secure_setup()
    assert setup.secure
    updates = [local_update(message, {}, setup)[0] for message in secure_server(setup).start_round()]
    for place, value, reason in (
        (2, 2**30, "exceeds that of 3 clients"),
        (0, -(2**20), "weights of 3 clients"),
    ):
        sums = SliceSums(setup.secure, setup.first)
        for update in updates:
            assert update
            vector = unpack_integers(update.payloads["own"].tensors[INTEGERS], 32, 10)
            if update.client == 1:
                vector[place] += np.int64(value).view(np.uint64)
            payload = Payload({INTEGERS: pack_integers(vector, 32)}, 8)
            sums.add(replace(update, payloads={"own": payload}))
        with pytest.raises(Damaged, match=reason):
            sums.decode("own")


def test_sums_have_two_thirds_of_the_clients_by_default_and_never_one() -> None:
    assert [fewest_in_sum(None, planned) for planned in (1, 2, 3, 4, 5, 20, 100)] == [2, 2, 2, 3, 4, 14, 67]
    assert fewest_in_sum(7, 100) == 7
    for cohort in range(1, 200):
        for threshold in (None, 2, 50):
            assert 2 * fewest_that_unmask(threshold, cohort) > cohort


def test_slices_that_the_same_clients_report_share_their_masks() -> None:
    both = {0: ("encoder", "middle"), 1: ("decoder",), 2: ("middle", "encoder"), 3: ("decoder", "head")}
    assert group_slices(both) == {
        "decoder": ("decoder",),
        "encoder": ("encoder", "middle"),
        "head": ("head",),
    }
    assert group_slices(dict.fromkeys(range(9), ("b", "a"))) == {"a": ("a", "b")}


# --- a share of the scalars ---


def test_a_share_of_the_scalars_is_that_of_all_clients_and_another_in_each_round(tmp_path: Path) -> None:
    setup, all_sent = secure_setup(fields={"share": 0.4}), secure_setup()
    server, whole = secure_server(setup), secure_server(all_sent)
    changed = []
    for round_ in (1, 2, 3):
        before = dict(server.theta)
        for _ in federate(server, inline(toy_site(setup, tmp_path / "part")), round_):
            pass
        changed.append({n: tensor.ne(before[n]) for n, tensor in server.theta.items()})
        own = torch.cat([changed[-1][f"own.{part}"].flatten() for part in ("weight", "bias")])
        assert (own.sum(), changed[-1]["shared.weight"].sum() + changed[-1]["shared.bias"].sum()) == (4, 2)
    assert any(not changed[0][name].equal(changed[1][name]) for name in changed[0])
    for _ in federate(whole, inline(toy_site(all_sent, tmp_path / "whole")), 1):
        pass
    for name, tensor in whole.theta.items():
        first = torch.where(changed[0][name], tensor, setup.first[name])
        assert torch.allclose(first, at_round_one(setup, tmp_path)[name], atol=1 / FIXED.scale)
    rows = [(row.slice, row.params, row.bytes) for row in server.ledger.entries if row.direction == "up"]
    assert ("own", 4, 4 * (2 + 4)) in rows


def at_round_one(setup: ClientSetup, folder: Path) -> State:
    server = secure_server(setup)
    for _ in federate(server, inline(toy_site(setup, folder / "once")), 1):
        pass
    return server.theta


def test_the_weight_of_a_client_must_be_a_whole_number() -> None:
    class Half(Scaffold):
        def weight(self, num_examples: int) -> float:
            return 0.5

    setup = secure_setup(algorithm=Half())
    (message, *_) = secure_server(setup).start_round()
    with pytest.raises(BadInput, match=r"algorithm.weight must be one of at least 1, got 0.5"):
        local_update(message, {}, setup)


# --- bytes ---


def test_the_traffic_of_keys_and_shares_grows_linearly_for_a_client() -> None:
    sizes = {}
    for clients in (5, 20, 100):
        traffic = mask_traffic(dict.fromkeys(range(clients), ("all",)), range(clients), ["all"])
        assert len(set(traffic.values())) == 1
        sizes[clients] = sum(traffic[0])
    assert (sizes[20] - sizes[5]) / 15 == (sizes[100] - sizes[20]) / 80


def test_the_ledger_counts_masks_beside_the_vectors(tmp_path: Path) -> None:
    setup = secure_setup()
    server = secure_server(setup)
    for _ in federate(server, inline(toy_site(setup, tmp_path)), 1):
        pass
    rows = [(row.client, row.direction, row.slice, row.params, row.bytes) for row in server.ledger.entries]
    expected = mask_traffic(dict.fromkeys(range(3), ("own", "shared")), range(3), ["own", "shared"])
    for client, (down, up) in expected.items():
        assert (client, "down", "aggregation", 0, down) in rows
        assert (client, "up", "aggregation", 0, up) in rows
        assert (client, "up", "own", 8, 4 * (2 + 8)) in rows


# --- with client-level privacy ---


def test_the_sum_of_the_fewest_clients_has_the_promised_noise() -> None:
    """The noise of each is drawn by itself; that of three together has the deviation of the account."""
    noise, clip, clients, numbers = 3.0, 0.5, 4, 20_000
    fewest = fewest_in_sum(None, clients)
    largest = clip * FIXED.scale + numbers**0.5
    discrete = DiscreteNoise(noise * largest / fewest**0.5, SeededNoise(1))
    slices, theta = SliceMap({"all": ("w",)}), {"w": torch.zeros(numbers)}
    secure = SecureAggregation(FIXED, None, slices, FedAvg(), 5, discrete, sums_loss=False)
    sums = SliceSums(secure, theta)
    for client in range(fewest):
        payloads = secure.encode(("all",), theta, theta, {}, 1, None, 1, client)
        sums.add(Update("toy", 1, client, 0, None, payloads))
    drawn = sums.decode("all").values["w"].numpy() * fewest * FIXED.scale / (noise * largest)
    assert kstest(drawn, "norm").pvalue > 1e-6
    assert abs(drawn.std() - 1) < 0.02


def test_a_client_clips_before_its_change_becomes_integers() -> None:
    mechanism = GaussianMechanism(1e-3, 0.0, 3, 3.0, True, None, SeededNoise(1), summed=True)
    setup = secure_setup(privacy=mechanism)
    (message, *_) = secure_server(setup).start_round()
    update, _ = local_update(message, {}, setup)
    assert update
    sums = SliceSums(setup.secure, setup.first)
    sums.add(update)
    values = {n: t for slice_ in ("own", "shared") for n, t in sums.decode(slice_).values.items()}
    assert update_norm(values, setup.first, {}) <= 1e-3 + 11**0.5 / FIXED.scale
