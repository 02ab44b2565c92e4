"""Transforms: each against an independent computation, with its packed size; chains keep their errors."""

import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control import Control
from torch import Tensor
from toy import FULL, PARTIAL, federate, inline, toy_server, toy_setup, toy_site

from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client import local_update
from fedlight.federation.codec import DELTA, Chain, Codec
from fedlight.federation.messages import AUX, Broadcast, Payload, State, Update, from_bytes, to_bytes
from fedlight.federation.method import Method
from fedlight.federation.packing import join, pack_bits, split, unpack_bits
from fedlight.federation.server import Server
from fedlight.federation.transforms.huffman import Huffman
from fedlight.federation.transforms.lowrank import LowRank
from fedlight.federation.transforms.quantisation import Quantisation
from fedlight.federation.transforms.rounding import Rounding
from fedlight.federation.transforms.sign import Sign
from fedlight.federation.transforms.topk import TopK
from fedlight.runtime.errors import BadInput, Damaged, Diverged

STAGES: dict[str, list[Any]] = {
    "int8": [Quantisation(8)],
    "int4": [Quantisation(4)],
    "int2": [Quantisation(2)],
    "sign": [Sign()],
    "rounding": [Rounding(1.0)],
    "topk": [TopK(0.25)],
    "lowrank": [LowRank(1)],
    "lowrank-int8": [LowRank(1), Quantisation(8)],
    "topk-sign-huffman": [TopK(0.25), Sign(), Huffman()],
    "topk-int4-huffman": [TopK(0.25), Quantisation(4), Huffman()],
}
ODD: dict[str, tuple[int, ...]] = {
    "convolution": (3, 2, 3, 3),
    "vector": (5,),
    "scalar": (),
    "empty": (0, 4),
    "hollow": (4, 0),
    "one": (1, 1),
}


def odd_state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in ODD.items()}
    return {**state, "constant": torch.full((2, 3), 0.375), "zero": torch.zeros(2, 3)}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def encoded_size(stages: list[Any], state: State) -> int:
    return len(Chain(stages).encode(state, rng(), "it"))


def through(stages: list[Any], state: State, seed: int = 0) -> State:
    chain = Chain(stages)
    return chain.decode(chain.encode(state, rng(seed), "it"), state)


# --- packing


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8, 9, 33])
def test_bits_are_really_packed(bits: int, count: int) -> None:
    codes = torch.from_numpy(rng().integers(0, 2**bits, count).astype(np.uint8))
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-bits * count // 8)
    whole = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    assert bytes(packed.tolist()) == whole.to_bytes(len(packed), "little")
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_tensors_share_bytes_and_a_wrong_number_of_bytes_is_noticed() -> None:
    state = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(2, 3),
        "c": torch.zeros(0, 2),
        "d": torch.tensor(2.5, dtype=torch.bfloat16),
    }
    content = join(state)
    assert bytes(content.tolist()[:3]) == b"\0\1\2"
    assert len(content) == 3 + 24 + 0 + 2
    back = split(content, state)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[name], tensor)
    for wrong in (content[:-1], torch.cat([content, content[:1]])):
        with pytest.raises(Damaged, match="29 are expected"):
            split(wrong, state)


# --- quantisation


def quantised(values: np.ndarray, bits: int, draws: np.ndarray) -> np.ndarray:
    """One channel, entry by entry: to the level below or above, with the odds of the distance."""
    levels = 2 ** (bits - 1) - 1
    bound = float((torch.tensor(np.abs(values).max()) * (1 + 2**-7)).bfloat16())
    decoded = []
    for value, draw in zip(values, draws, strict=True):
        share = value / bound * levels
        below = int(np.floor(share))
        decoded.append((below + (draw >= 1 - (share - below))) * bound / levels)
    return np.array(decoded)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisation_matches_an_independent_computation(bits: int) -> None:
    state = {"w": torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))}
    decoded = through([Quantisation(bits)], state)["w"]
    draws = rng().random((3, 10), dtype=np.float32)
    for channel in range(3):
        expected = quantised(state["w"][channel].flatten().numpy().astype(float), bits, draws[channel])
        np.testing.assert_allclose(decoded[channel].flatten().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisation_is_right_on_average(bits: int) -> None:
    """Over 10,000 draws each mean is within five standard errors, which are known from the step."""
    row = torch.tensor([[0.9, -0.31, 0.02, -1.0, 0.0, 0.5]])
    stage, stream = Quantisation(bits), rng()
    many = {"w": row.repeat(10_000, 1)}  # a channel a draw
    decoded = stage.decode(stage.encode(many, stream), many)["w"].double()
    step = float((torch.tensor(1.0) * (1 + 2**-7)).bfloat16()) / stage.levels
    share = (row.double() / step) % 1
    error = step * (share * (1 - share)).sqrt() / 100
    assert ((decoded.mean(0) - row).abs() <= 5 * error + 1e-7).all()
    assert (decoded.std(0) <= 100 * error * 1.1 + 1e-7).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1e-35, 1.0, 1e30])
def test_a_quantised_entry_is_off_by_less_than_a_step(bits: int, size: float) -> None:
    row = torch.randn(4, 500, generator=torch.Generator().manual_seed(2)) * size
    off = (through([Quantisation(bits)], {"w": row})["w"] - row).abs()
    step = row.abs().amax(1, keepdim=True) * (1 + 2**-6) / (2 ** (bits - 1) - 1)
    assert (off <= step * (1 + 1e-6)).all()


def test_values_below_the_smallest_scale_decode_to_zero() -> None:
    for stage in (Quantisation(4), Sign()):
        assert not through([stage], {"w": torch.tensor([[1e-42, -1e-43]])})["w"].any()


def test_the_largest_draw_keeps_the_largest_entry_in_its_range() -> None:
    """127 + 0.99999994 is 128 in float32."""

    class Largest:
        def random(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
            return np.full(shape, np.nextafter(np.float32(1), np.float32(0)), dtype)

    exact = torch.tensor([[1.0, -1.0]]).bfloat16().float() * 2  # a bound that bfloat16 holds
    stage = Quantisation(8)
    decoded = stage.decode(stage.encode({"w": exact}, Largest()), {"w": exact})["w"]  # type: ignore[arg-type]
    assert decoded[0, 0] <= 2 * (1 + 2**-6)


@pytest.mark.parametrize(
    ("bits", "codes"), [(8, 73), (4, 27 + 3 + 1 + 1 + 3 + 3), (2, 14 + 2 + 1 + 1 + 2 + 2)]
)
def test_quantised_sizes_by_hand(bits: int, codes: int) -> None:
    """Entries 54, 5, 1, 0, 0, 1, 6, 6, a tensor begins a byte; channels 3, 1, 1, 0, 0, 1, 2, 2."""
    assert encoded_size([Quantisation(bits)], odd_state()) == codes + 2 * 10


def test_constants_and_nothing_survive_quantisation() -> None:
    state = {"zero": torch.zeros(2, 3), "scalar": torch.tensor(0.0), "empty": torch.zeros(0, 3)}
    for name, tensor in through([Quantisation(2)], state).items():
        assert torch.equal(tensor, state[name])


# --- sign


def test_sign_matches_an_independent_computation() -> None:
    state = odd_state()
    decoded = through([Sign()], state)
    for name, tensor in state.items():
        assert decoded[name].shape == tensor.shape
        rows = [tensor] if tensor.dim() < 2 else list(tensor)
        arrived = [decoded[name]] if tensor.dim() < 2 else list(decoded[name])
        for row, came in zip(rows, arrived, strict=True):
            mean = sum(abs(float(entry)) for entry in row.flatten()) / max(1, row.numel())
            expected = [(1 if entry >= 0 else -1) * mean for entry in row.flatten()]
            assert came.flatten().tolist() == pytest.approx(expected, rel=2**-8)


def test_the_error_of_sign_is_as_documented() -> None:
    row = torch.randn(1, 4000, generator=torch.Generator().manual_seed(3))
    lost = (row - through([Sign()], {"w": row})["w"]).square().sum()
    said = row.square().sum() - row.abs().sum() ** 2 / 4000
    assert float(lost) == pytest.approx(float(said), rel=1e-3)


def test_sign_sizes_by_hand() -> None:
    assert encoded_size([Sign()], odd_state()) == 7 + 1 + 1 + 1 + 1 + 1 + 2 * 10


# --- top-k


def test_rounding_matches_an_independent_computation() -> None:
    """Nearest multiples of a step, which bfloat16 holds to 8 bits; from seven steps on an entry is cut."""
    values = [3.0, -0.4, 0.6, 0.0, -1.4, 40.0]
    size = 1.5 * (sum(value**2 for value in values) / 6) ** 0.5  # the step
    decoded = through([Rounding(1.5)], {"w": torch.tensor(values).view(2, 3)})["w"].flatten().tolist()
    expected = [min(7, round(abs(value) / size)) * size * (1 if value > 0 else -1) for value in values]
    np.testing.assert_allclose(decoded, expected, rtol=2**-8)
    assert set(decoded) == {0.0, decoded[-1]}

    values[-1] = 3.0
    size = 0.1 * (sum(value**2 for value in values) / 6) ** 0.5
    decoded = through([Rounding(0.1)], {"w": torch.tensor(values)})["w"].tolist()
    np.testing.assert_allclose(decoded[0], 7 * size, rtol=2**-8)
    np.testing.assert_allclose(decoded[1], -round(0.4 / size) * size, rtol=2**-8)


def test_rounding_sizes_by_hand() -> None:
    state = odd_state()
    codes = {
        "convolution": 27,
        "vector": 3,
        "scalar": 1,
        "empty": 0,
        "hollow": 0,
        "one": 1,
        "constant": 3,
        "zero": 3,
    }
    assert encoded_size([Rounding(1.0)], state) == sum(codes.values()) + 2 * len(codes)


def test_rounding_needs_a_step() -> None:
    for step in (0.0, -1.0, float("nan")):
        with pytest.raises(BadInput, match="step of rounding must be above 0"):
            Rounding(step)


def test_topk_matches_an_independent_computation() -> None:
    state = odd_state()
    for share in (0.01, 1 / 3, 1.0):
        decoded = through([TopK(share)], state)
        for name, tensor in state.items():
            flat, arrived = tensor.flatten().tolist(), decoded[name].flatten().tolist()
            largest = sorted(map(abs, flat), reverse=True)[: int(np.ceil(share * len(flat)))]
            sent = sorted((abs(entry) for entry in arrived if entry), reverse=True)
            assert sent == [entry for entry in largest if entry]
            assert all(came in (0.0, meant) for came, meant in zip(arrived, flat, strict=True))


@pytest.mark.parametrize(
    ("size", "count", "where", "form"),
    [
        (256, 32, 32, "positions"),  # a byte each, no more than a mask
        (256, 33, 32, "mask"),
        (257, 16, 32, "positions"),  # two bytes each; 257 bits are 33 bytes
        (257, 17, 33, "mask"),
        (65_536, 4_096, 8_192, "positions"),
        (65_536, 4_097, 8_192, "mask"),
        (65_537, 2_048, 8_192, "positions"),  # four bytes each; 65,537 bits are 8,193 bytes
        (65_537, 2_049, 8_193, "mask"),
    ],
)
def test_topk_sends_positions_in_the_fewest_bytes(size: int, count: int, where: int, form: str) -> None:
    stage = TopK((count - 0.5) / size)
    flat = torch.randn(size, generator=torch.Generator().manual_seed(size))
    flat[-1] = 10.0  # the last position is the one that must fit
    assert f"w.{form}" in stage.encode({"w": flat}, rng())
    assert encoded_size([stage], {"w": flat}) == 4 * count + where
    arrived = through([stage], {"w": flat})["w"]
    assert (arrived != 0).sum() == count
    assert arrived[-1] == 10.0


# --- low rank


def test_lowrank_matches_an_independent_computation() -> None:
    """The projection on two power steps from the same start, made orthonormal by Gram and Schmidt."""
    state = {"w": torch.randn(12, 3, 2, 4, generator=torch.Generator().manual_seed(6))}
    matrix = state["w"].reshape(12, 24).double().numpy()
    start = rng().standard_normal((24, 2), dtype=np.float32).astype(float)
    for _ in range(2):
        product = matrix @ start
        first = product[:, 0] / np.linalg.norm(product[:, 0])
        second = product[:, 1] - first * (first @ product[:, 1])
        basis = np.stack([first, second / np.linalg.norm(second)], 1)
        start = matrix.T @ basis
    decoded = through([LowRank(2)], state)["w"]
    np.testing.assert_allclose(decoded.reshape(12, 24).numpy(), basis @ start.T, atol=1e-4)
    lost = np.linalg.norm(matrix - decoded.reshape(12, 24).numpy())
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert np.linalg.norm(singular[2:]) <= lost * (1 + 1e-6) <= np.linalg.norm(singular) * (1 + 1e-6)


def test_lowrank_keeps_what_has_its_rank_and_what_it_cannot_shrink() -> None:
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    state = {**odd_state(), "matrix": matrix.view(20, 6, 5), "zero": torch.zeros(9, 9)}
    decoded = through([LowRank(2)], state)
    torch.testing.assert_close(decoded["matrix"], state["matrix"], rtol=1e-4, atol=1e-4)
    kept = odd_state().keys() - {"convolution", "zero"}
    assert all(torch.equal(decoded[name], state[name]) for name in kept)
    assert not decoded["zero"].any()
    whole = sum(state[name].nbytes for name in kept)
    by_hand = 4 * 2 * ((20 + 30) + (3 + 18) + (9 + 9))
    assert encoded_size([LowRank(2)], state) == whole + by_hand


# --- chains


def test_integer_tensors_are_not_encoded() -> None:
    held = {"w": torch.zeros(8), "n": torch.tensor(3)}
    codec = Codec([Sign()])
    payload, errors = codec.encode({"w": torch.ones(8), "n": torch.tensor(4)}, held, {}, rng(), "it")
    assert payload.params == 9
    assert payload.bytes == 1 + 2 + 8
    assert codec.decode(payload, held)["n"] == 4
    assert errors.keys() == {"w"}


@pytest.mark.parametrize("name", STAGES)
def test_a_chain_gives_back_names_shapes_dtypes_and_takes_its_draws_from_the_stream(name: str) -> None:
    state = {**odd_state(), "half": torch.randn(4, 4).bfloat16()}
    decoded = through(STAGES[name], state)
    for key, tensor in state.items():
        assert (decoded[key].shape, decoded[key].dtype) == (tensor.shape, tensor.dtype)
        assert decoded[key].isfinite().all()
    again, other = through(STAGES[name], state), through(STAGES[name], state, seed=1)
    assert all(torch.equal(decoded[key], again[key]) for key in state)
    drawn = any(isinstance(stage, Quantisation | LowRank) for stage in STAGES[name])
    assert drawn != all(torch.equal(decoded[key], other[key]) for key in state)


def test_entropy_coding_comes_last_and_loses_nothing() -> None:
    plain, coded = Chain([Quantisation(4)]), Chain([Quantisation(4), Huffman()])
    state = {"w": torch.randn(64, 100, generator=torch.Generator().manual_seed(4)) ** 3}
    contents = [chain.encode(state, rng(), "it") for chain in (plain, coded)]
    assert torch.equal(plain.decode(contents[0], state)["w"], coded.decode(contents[1], state)["w"])
    counts = np.unique(contents[0].numpy(), return_counts=True)[1] / len(contents[0])
    entropy = -(counts * np.log2(counts)).sum() / 8
    assert entropy * len(contents[0]) <= len(contents[1]) <= 1.1 * entropy * len(contents[0])
    with pytest.raises(BadInput, match="must be the last stage"):
        Chain([Huffman(), Quantisation(4)])


def test_bytes_that_are_no_payload_are_refused() -> None:
    state = {"w": torch.randn(64, 100)}
    chain = Chain([Sign(), Huffman()])
    content = chain.encode(state, rng(), "it")
    bomb = Huffman().compress(bytes(10**7))
    longer = torch.cat([content, content[:1]])
    for wrong in (
        content[:-20],
        content.flip(0),
        longer,
        torch.frombuffer(bytearray(bomb), dtype=torch.uint8),
    ):
        with pytest.raises(Damaged, match="an encoded payload"):
            chain.decode(wrong, state)


def encoded(stages: list[Any], state: State, **changed: Tensor) -> Tensor:
    """The bytes of a delta, some of whose sent tensors are other ones."""
    sent = stages[0].encode(state, rng())
    assert all(
        (changed[name].shape, changed[name].dtype) == (sent[name].shape, sent[name].dtype) for name in changed
    )
    return join({name: (sent | changed)[name] for name in stages[0].sent_like(state)})


def bfloats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def codes(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


HOSTILE: list[tuple[Any, dict[str, Tensor], str]] = [
    (TopK(0.05), {"w.positions": codes(0, 0, 1, 2, 3, 4)}, "ascending positions"),
    (TopK(0.05), {"w.positions": codes(1, 0, 2, 3, 4, 5)}, "ascending positions"),
    (TopK(0.05), {"w.positions": codes(0, 1, 2, 3, 4, 101)}, "ascending positions"),
    (TopK(0.5), {"w.mask": codes(*[255] * 13)}, "after its last code"),
    (TopK(0.5), {"w.mask": codes(*[255] * 12, 31)}, "ascending positions"),
    (TopK(0.5), {"w.mask": codes(*[0] * 13)}, "ascending positions"),
    (Quantisation(2), {"w.codes": codes(*[255] * 25, 1)}, "after its last code|above 2"),
    (Quantisation(2), {"w.codes": codes(*[3] * 25, 0)}, "a code of w above 2"),
    (Quantisation(8), {"w.codes": codes(*[255] * 101)}, "a code of w above 254"),
    (Quantisation(8), {"w.scales": bfloats(torch.inf)}, "a scale of w"),
    (Quantisation(4), {"w.scales": bfloats(torch.nan)}, "a scale of w"),
    (Sign(), {"w.scales": bfloats(-1.0)}, "a scale of w"),
    (Sign(), {"w.codes": codes(*[0] * 12, 255)}, "after its last code"),
    (Rounding(1.0), {"w.codes": codes(*[15] * 51)}, "a code of w above 14"),
    (Rounding(1.0), {"w.step": bfloats(torch.nan)[0]}, "a scale of w"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_payloads_that_no_encoder_produces_are_damaged(number: int) -> None:
    stage, changed, error_line = HOSTILE[number]
    state = {"w": torch.randn(101, generator=torch.Generator().manual_seed(3))}
    assert Chain([stage]).decode(encoded([stage], state), state)["w"].shape == (101,)
    with pytest.raises(Damaged, match=error_line):
        Chain([stage]).decode(encoded([stage], state, **changed), state)


@pytest.mark.parametrize("name", STAGES)
def test_content_that_is_not_a_vector_of_bytes_is_damaged(name: str) -> None:
    chain, state = Chain(STAGES[name]), {"w": torch.randn(8, 16)}
    content = chain.encode(state, rng(), "it")
    for wrong in (content.float(), content.to(torch.int8), content[None], content[:0], content[:-1]):
        with pytest.raises(Damaged):
            chain.decode(wrong, state)


def test_a_deflated_bomb_takes_no_more_memory_than_what_is_expected() -> None:
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = deflate.compress(bytes(2**28)) + deflate.flush()
    content = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    chain, state = Chain([Sign(), Huffman()]), {"w": torch.randn(64, 100)}
    tracemalloc.start()
    try:
        with pytest.raises(Damaged, match="does not decompress to"):
            chain.decode(content, state)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(bomb)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", STAGES)
def test_the_encoding_error_is_added_to_the_next_delta(name: str) -> None:
    """Over the rounds the sum of what arrives is the sum of what was meant, up to what is still owed."""
    codec, draws = Codec(STAGES[name]), rng()
    generator = torch.Generator().manual_seed(1)
    held = {"w": torch.zeros(4, 16)}
    meant, arrived, errors = torch.zeros(4, 16), torch.zeros(4, 16), {}
    for _ in range(50):
        moved = torch.randn(4, 16, generator=generator)
        payload, errors = codec.encode({"w": moved}, held, errors, draws, "it")
        assert payload.params == 64
        meant, arrived = meant + moved, arrived + codec.decode(payload, held)["w"]
    torch.testing.assert_close(arrived + errors["w"], meant, rtol=1e-4, atol=1e-4)
    assert errors["w"].square().mean().sqrt() < 8


class Forgetful(Codec):
    """Error feedback is left out."""

    def encode(self, values: State, received: State, errors: State, *rest: Any) -> tuple[Payload, State]:
        return super().encode(values, received, {}, *rest)


ENTRIES = torch.linspace(0.5, 1.5, 99)
THREE = torch.where(torch.arange(99) % 3 == torch.arange(3)[:, None], -5.0, 1.0) * ENTRIES
TWO = torch.cat([torch.tensor([[8.0], [-8.0]]), ENTRIES.repeat(2, 1)], 1)


@pytest.mark.parametrize(
    ("stage", "centres", "rate", "steps"),
    [
        pytest.param(Sign(), THREE, 0.02, 200, id="of three signs the two outvote the large one"),
        pytest.param(
            TopK(0.01), TWO, 0.01, 600, id="of a hundred entries two clients send the one they dispute"
        ),
    ],
)
def test_on_a_quadratic_error_feedback_converges_and_its_absence_stalls(
    stage: Any, centres: Tensor, rate: float, steps: int
) -> None:
    """A parabola a client: the mean of their centres is the minimum of the mean."""
    optimum = centres.mean(0, keepdim=True)

    def distance(codec: Codec) -> float:
        theta, errors, draws = torch.zeros_like(optimum), [{} for _ in centres], rng()
        for _ in range(steps):
            values = []
            for client, centre in enumerate(centres):
                trained = {"w": theta - rate * (theta - centre)}
                payload, errors[client] = codec.encode(trained, {"w": theta}, errors[client], draws, "it")
                values.append(codec.decode(payload, {"w": theta})["w"])
            theta = torch.stack(values).mean(0)
        return float((theta - optimum).norm() / optimum.norm())

    assert distance(Codec([stage])) < 0.1
    assert distance(Forgetful([stage])) > 0.9


# --- both ways, in a federation


def run(folder: Path, codec: Codec, method: Method = FULL, rounds: int = 6, **server: Any) -> Server:
    """A federation of toy clients, half of whom are away in a round."""
    setup = toy_setup(method, codec=codec)
    made = toy_server(setup, **{"clients": 4, "fraction": 0.5, **server})
    for _ in federate(made, inline(toy_site(setup, folder)), rounds):
        pass
    return made


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", [FULL, PARTIAL], ids=["FULL", "PARTIAL"])
@pytest.mark.parametrize("seeded", [False, True])
def test_a_client_that_missed_rounds_catches_up_with_the_server_s_reference(
    tmp_path: Path, method: Method, seeded: bool
) -> None:
    """It gets the deltas that it missed, or the values where they are fewer bytes; and some drop out."""
    delta, values = {"own": 14, "shared": 7}, {"own": 32, "shared": 12}  # bytes, by hand
    setup = toy_setup(method, codec=Codec([Sign()], [Quantisation(8)], seeded), epochs=1)
    server, site = toy_server(setup, clients=5, fraction=0.4, dropout=0.3), toy_site(setup, tmp_path)
    seen = set()
    while server.round < 15:
        broadcasts = server.start_round()
        for update in inline(site).exchange(broadcasts):
            server.receive(update)
        for broadcast in broadcasts:
            kept = site.memory.read(broadcast.client, broadcast.round)["reference"]
            for slice_ in setup.method.downlink:
                held = server._downlink.received(slice_)
                assert equal({name: kept[name] for name in held}, held)
                missed = broadcast.round - (broadcast.previous or 1)
                cheaper = delta[slice_] * missed < values[slice_]
                encoded = cheaper and bool(broadcast.previous or seeded)
                payload = broadcast.payloads.get(slice_, Payload.plain({}))
                assert payload.bytes == (delta[slice_] * missed if encoded else values[slice_])
                assert sum(name.startswith(DELTA) for name in payload.tensors) == missed * encoded
                seen.add((bool(broadcast.previous), missed, encoded))
        server.finish_round()
    assert {(True, 1, True), (True, 3, False), (False, 0, seeded)} <= seen
    assert ((True, 2, True) in seen) == (method is FULL)


def test_the_server_s_reference_is_the_state_of_its_clients(tmp_path: Path) -> None:
    """What the downlink lost is forgotten, and the global model is the mean of the trained ones; by hand."""
    setup = toy_setup(codec=Codec(down=[Sign()]), epochs=1)
    server, site = toy_server(setup, clients=3), toy_site(setup, tmp_path)
    for round_ in (1, 2, 3):
        before, trained = server.theta, []
        for update in inline(site).exchange(server.start_round()):
            held = server._downlink.received("own") | server._downlink.received("shared")
            assert equal(server.theta, held)
            trained.append(
                (update.num_examples, update.payloads["own"].tensors | update.payloads["shared"].tensors)
            )
            server.receive(update)
        lost = (before["own.weight"] - held["own.weight"]).abs().max()
        assert lost == 0 if round_ == 1 else lost > 1e-3
        server.finish_round()
        total = sum(n for n, _ in trained)
        for name, tensor in server.theta.items():
            mean = sum(n * values[name].double() for n, values in trained) / total
            torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)


def test_a_client_adds_its_stored_encoding_error_to_its_next_delta() -> None:
    """What a client remembers as lost leaves it, or is remembered again: nothing of it vanishes."""
    received = toy_server(toy_setup()).start_round()[0]
    plain, _ = local_update(received, {}, toy_setup())
    assert plain is not None
    setup = toy_setup(codec=Codec([TopK(0.25)]))
    owed = {name: torch.full_like(tensor, 5.0) for name, tensor in setup.first.items()}
    update, memory = local_update(received, {"errors": owed}, setup)
    assert update is not None
    for slice_, payload in update.payloads.items():
        start = received.payloads[slice_].tensors
        arrived = setup.codec.decode(payload, start)
        for name, tensor in start.items():
            meant = plain.payloads[slice_].tensors[name] + owed[name]
            torch.testing.assert_close(arrived[name] + memory["errors"][name], meant, rtol=1e-4, atol=1e-4)
            assert (arrived[name] - tensor).abs().max() > 2


def test_a_client_that_drops_out_keeps_its_encoding_error() -> None:
    setup = toy_setup(codec=Codec([Sign()], [Sign()]))
    first = toy_server(setup).start_round()[0]
    _, memory = local_update(first, {}, setup)
    lost, kept = local_update(replace(first, round=2, previous=1, drops_out=True), memory, setup)
    assert lost is None
    assert any(error.any() for error in kept["errors"].values())
    assert equal(kept["errors"], memory["errors"])


@pytest.mark.parametrize("method", [FULL, PARTIAL], ids=["FULL", "PARTIAL"])
def test_an_initial_model_from_the_seed_is_not_sent(tmp_path: Path, method: Method) -> None:
    error_line, known = (
        run(tmp_path / str(seeded), Codec(seeded_start=seeded), method, dropout=0.3)
        for seeded in (False, True)
    )
    assert equal(error_line.theta, known.theta)
    entries = {
        seeded: {
            (e.round, e.client, e.slice): e.bytes for e in server.ledger.entries if e.direction == "down"
        }
        for seeded, server in ((False, error_line), (True, known))
    }
    met: set[int] = set()
    for (round_, client, slice_), size in entries[False].items():
        first = client not in {c for r, c, _ in entries[False] if r < round_}
        crosses = round_ > 1 and not (first and slice_ not in known.method.downlink)
        assert entries[True].get((round_, client, slice_), 0) == crosses * size
        met.add(client)
    assert len(met) > 2


def test_lossless_encoding_in_both_directions_is_fedavg(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", Codec()).theta
    whole = run(tmp_path / "whole", Codec([TopK(1.0)], [TopK(1.0)])).theta
    for name, tensor in plain.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-5)


def test_values_that_are_not_finite_are_rejected_by_client_and_slice() -> None:
    setup = toy_setup(PARTIAL, codec=Codec([Sign()], [Sign()]))
    server = toy_server(setup)
    memory = {"errors": {"shared.weight": torch.tensor([[0.0, float("inf")]])}}
    broadcast = server.start_round()[1]
    with pytest.raises(Diverged, match="slice shared of client 1 in round 1 left the finite numbers"):
        local_update(broadcast, memory, setup)
    server.finish_round()
    server.theta["shared.bias"] = torch.tensor([float("nan")])
    with pytest.raises(Diverged, match="slice shared of the server in round 2 left the finite numbers"):
        server.start_round()[0]


WARM = PARTIAL.model_copy(update={"warm_start": 2, "freeze": ("own",)})


class Killed(Exception):
    """The process is gone; what is on disk is left."""


def weight(message: Broadcast | Update) -> list[tuple[int, int, str, str, int, int]]:
    """The rows that a message should have in the ledger, from its bytes as they cross."""
    crossed = from_bytes(to_bytes(message))
    direction = "down" if isinstance(message, Broadcast) else "up"
    sizes = {
        name: sum(len(tensor.numpy().tobytes()) for tensor in tensors.values())
        for name, tensors in ((name, payload.tensors) for name, payload in crossed.payloads.items())
    }
    params = {name: payload.params for name, payload in crossed.payloads.items()}
    return [(message.round, message.client, direction, name, params[name], sizes[name]) for name in sizes]


def weighed(folder: Path, setup: Any, kill_at: int = -1, backwards: bool = False) -> tuple[Server, list[Any]]:
    """A federation with clients that are away and some that drop out, and all that crossed in it.

    Args:
        folder: of server and clients; what is there is gone on from.
        setup: of the clients.
        kill_at: the step at which all processes are killed, counted from 0; there are steps between any two
            things that happen.
        backwards: the last client trains first.
    """
    steps = iter(range(10_000))
    crossed = []

    def step() -> None:
        if next(steps) == kill_at:
            raise Killed

    server, checkpoint = (
        toy_server(setup, clients=4, fraction=0.75, dropout=0.3),
        ServerCheckpoint(folder, "toy"),
    )
    server.resume(checkpoint)
    site = toy_site(setup, folder)
    while server.round < 4:
        broadcasts = server.start_round()
        for broadcast in reversed(broadcasts) if backwards else broadcasts:
            crossed += weight(broadcast)
            step()
            if receipt := site.update([broadcast])[0]:
                step()
                update = from_bytes(receipt.read())
                crossed += weight(update)
                server.receive(update)
            step()
        server.finish_round()
        step()
        server.save(checkpoint, {})
        step()
    return server, crossed


@pytest.mark.parametrize("method", [FULL, PARTIAL, WARM], ids=["FULL", "PARTIAL", "WARM"])
@pytest.mark.parametrize("name", STAGES)
def test_the_ledger_is_the_wire_for_every_chain_at_any_order(
    tmp_path: Path, method: Method, name: str
) -> None:
    setup = toy_setup(method, codec=Codec(STAGES[name], STAGES[name], seeded_start=True), epochs=1)
    server, crossed = weighed(tmp_path / "forwards", setup)
    backwards, _ = weighed(tmp_path / "backwards", setup, backwards=True)
    assert equal(server.theta, backwards.theta)
    assert server.ledger.rows() == backwards.ledger.rows()
    assert sorted(server.ledger.rows()) == sorted(crossed)
    assert 0 < len({row[:2] for row in crossed if row[2] == "up"}) < 12
    assert server.ledger.bytes == sum(row[5] for row in crossed)


def test_auxiliary_state_is_sent_uncompressed(tmp_path: Path) -> None:
    codec = Codec(STAGES["int4"], STAGES["int4"], seeded_start=True)
    server, crossed = weighed(tmp_path, toy_setup(PARTIAL, Control(0.5), codec, epochs=1))
    aux = [row for row in server.ledger.rows() if row[3] == AUX]
    assert {(row[4], row[5]) for row in aux} == {(1, 4)}
    assert {row[2] for row in aux} == {"down", "up"}
    assert sorted(server.ledger.rows()) == sorted(crossed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("int4", FULL), ("topk-int4-huffman", WARM)])
def test_a_federation_killed_between_any_two_steps_ends_the_same(
    tmp_path: Path, name: str, method: Method
) -> None:
    setup = toy_setup(method, codec=Codec(STAGES[name], STAGES[name], seeded_start=True), epochs=1)
    quiet, _ = weighed(tmp_path / "quiet", setup)
    for kill_at in range(0, 1000, 3):
        folder = tmp_path / str(kill_at)
        try:
            weighed(folder, setup, kill_at)
            break
        except Killed:
            again, _ = weighed(folder, setup)
        assert equal(again.theta, quiet.theta)
        assert again.ledger.rows() == quiet.ledger.rows()
        assert equal(again._downlink.received("own"), quiet._downlink.received("own"))
    assert kill_at > 30
