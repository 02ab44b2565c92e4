"""Which configurations secure aggregation refuses, in one line, and what the others say beforehand."""

import re
from pathlib import Path

import pytest
from composed import config

from fedlight.deployment.disclosure import describe_disclosure
from fedlight.experiment.clients import make_site
from fedlight.experiment.estimate import estimate
from fedlight.experiment.plan_table import print_plan
from fedlight.experiment.server_view import describe_server_view
from fedlight.experiment.setup import make_cell_server
from fedlight.experiment.trial import check
from fedlight.federation.messages import Update
from fedlight.federation.secure.secure_sum import SecureAggregation
from fedlight.runs.identity import cell_id
from fedlight.runtime.errors import BadInput

SECURE = ("aggregation=secure", "trainer.accelerator=cpu")
SECURE_ID = "3d2fb6c7"  # of the default cell, before the group had a key that is optional
NOISY = ("privacy=client", "privacy.noise_at=clients")

REFUSED = {
    "method=CENTRAL": r"needs a method whose clients report: CENTRAL and LOCAL have none",
    "method=LOCAL": r"needs a method whose clients report",
    "algorithm=fednova": r"needs an algorithm that declares by aux_like",
    "algorithm=localadam": r"needs an algorithm that declares by aux_like",
    "aggregation.share=0.5 algorithm=scaffold": (
        r"needs aggregation.share=1 with an algorithm that has auxiliary state, got 0.5"
    ),
    "transform=topk": r"needs a transform without stages for the uplink .* do not add up",
    "transform=int4_huffman": r"needs a transform without stages for the uplink",
    "privacy=client": r"needs privacy.noise_at=clients: the server sees no update that it could clip",
    "privacy=client privacy.noise_at=clients fraction=0.8": r"needs fraction=1 under privacy=client, got 0.8",
    "clients=1": r"in round 1 slice encoder is reported by 1 of 1 clients, .* its sum would be that client's",
    "fraction=0.2": r"is reported by 1 of 1 clients, and a sum has 2 at least",
    "aggregation.threshold=6": r"by 5 of 5 clients, and a sum has 6 at least \(aggregation.threshold=6\)",
    "method=USPLIT clients=2": r"slice \w+ is reported by 1 of 2 clients",
    "method=USPLIT aggregation.threshold=4": r"slice \w+ is reported by [23] of 5 clients",
    "aggregation.modulus_bits=16": (
        r"aggregation.modulus_bits=16 holds sums up to 32,767, and 5 clients of weight 24 at "
        r"aggregation.bits=16 reach 3,932,040: increase aggregation.modulus_bits or decrease aggregation.bits"
    ),
    "privacy=client privacy.noise_at=clients privacy.noise=9000.0": r"reach 163,835 and [\d,]+ for noise",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_secure_aggregation_refuses(overrides: str) -> None:
    with pytest.raises(BadInput) as refused:
        check(config(*SECURE, *overrides.split()), elsewhere=False)
    assert re.search(REFUSED[overrides], str(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "error_line"),
    [
        (
            "aggregation.threshold=1",
            "aggregation.threshold: input should be greater than or equal to 2",
        ),
        ("aggregation.modulus_bits=20", "aggregation.modulus_bits: input should be 16, 24, 32"),
        ("aggregation.bits=1", "aggregation.bits: input should be greater than or equal to 2"),
        ("aggregation.bits=33", "aggregation.bits: input should be less than or equal to 32"),
        ("aggregation.share=0.0", "aggregation.share: input should be greater than 0"),
        ("aggregation.share=1.5", "aggregation.share: input should be less than or equal to 1"),
        ("aggregation.clip=0.0", "aggregation.clip: input should be greater than 0"),
        ("aggregation.clip=inf", "aggregation.clip: input should be a finite number"),
    ],
)
def test_values_out_of_their_range(override: str, error_line: str) -> None:
    with pytest.raises(BadInput) as refused:
        config(*SECURE, override)
    assert error_line in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method=UDEC_WARM", "rounds=6"),
        ("method=USPLIT",),
        ("algorithm=scaffold",),
        ("algorithm=fedadam",),
        ("algorithm=fedprox",),
        ("privacy=example",),
        ("trainer.fuse=2",),
        ("aggregation.share=0.25",),
        NOISY,
    ],
)
def test_what_composes(overrides: tuple[str, ...]) -> None:
    parts = check(config(*SECURE, *overrides), elsewhere=False)
    assert parts is not None
    assert isinstance(parts.aggregation, SecureAggregation)
    assert (parts.aggregation.noise is not None) == (overrides == NOISY)
    assert parts.aggregation.sums_loss == (not overrides or "privacy" not in overrides[0])


def test_the_group_is_absent_from_the_id_and_its_keys_are_in_it() -> None:
    ids = {
        overrides: cell_id(config(*overrides.split()).plain())
        for overrides in (
            "",
            "aggregation=none",
            "aggregation=secure",
            "aggregation=secure aggregation.bits=20",
            "aggregation=secure aggregation.share=0.5",
            "aggregation=secure aggregation.threshold=3",
        )
    }
    assert ids[""] == ids["aggregation=none"]
    assert len(set(ids.values())) == 5
    assert ids["aggregation=secure"].endswith(SECURE_ID)


def test_the_noise_of_the_fewest_clients_is_that_of_the_account() -> None:
    """Noise 2 times the clip and what rounding adds to the norm, on the sum of 4 of 5 clients."""
    parts = check(config(*SECURE, *NOISY, "privacy.noise=2.0", "privacy.clip=0.5"), elsewhere=False)
    assert parts is not None
    assert parts.aggregation is not None
    assert parts.aggregation.noise is not None
    numbers = sum(tensor.numel() for tensor in parts.model.state_dict().values())
    largest = 0.5 * 32767 + numbers**0.5
    assert parts.aggregation.noise.deviation * 4**0.5 == pytest.approx(2.0 * largest)


@pytest.mark.parametrize("more", ["method=FULL", "method=UDEC", "method=USPLIT", "aggregation.share=0.3"])
def test_the_estimate_counts_what_the_ledger_counts(more: str) -> None:
    cell = config(*SECURE, more, "rounds=2", "federation.dropout=0.1")
    parts = check(cell, elsewhere=False)
    assert parts is not None
    assert parts.aggregation is not None
    server = make_cell_server("", parts)
    theta = parts.model.state_dict()
    for _ in range(2):
        for message in server.start_round():
            if not message.drops_out:
                payloads = {s: parts.aggregation.payload_like(s, theta) for s in message.uplink}
                for payload in payloads.values():
                    payload.tensors["integers"][0] = 1  # the weight
                server.receive(Update("", message.round, message.client, 0, None, payloads))
        server.finish_round()
    assert server.ledger.bytes == estimate(parts).bytes


def test_the_server_view_is_that_of_the_smallest_sum() -> None:
    assert describe_server_view(config()) == ""
    assert describe_server_view(config(*SECURE)) == "sums of at least 4 clients"
    assert describe_server_view(config(*SECURE, "aggregation.threshold=3")) == "sums of at least 3 clients"
    assert describe_server_view(config(*SECURE, "method=USPLIT")) == "sums of at least 2 clients"


def test_a_plan_and_an_institution_say_what_the_server_sees(capsys: pytest.CaptureFixture[str]) -> None:
    cell = config(*SECURE, "logger=none")
    print_plan([cell])
    assert (
        "fedlight: aggregation=secure: the server sees sums of at least 4 clients, and no single update\n"
    ) in capsys.readouterr().err
    parts = check(cell, elsewhere=False)
    assert parts is not None
    lines = [*describe_disclosure(cell, parts, 0)]
    assert lines[0] == "leaves, in each of up to 4 rounds, masked:"
    assert (
        "the server sees sums of at least 4 clients, and no single update, likewise of the numbers of images "
        "and the losses"
    ) in lines
    assert not [line for line in lines if "the mean training loss" in line]
    assert [line for line in lines if line.startswith("the keys of masks are not signed: a server that rep")]


def test_an_institution_is_told_whether_its_keys_are_signed() -> None:
    keys = ",".join(f"SHA256:{digit * 42}A" for digit in "ABCDE")
    cell = config("aggregation=secure", "transport=flower", f"transport.nodes=[{keys}]")
    parts = check(cell, elsewhere=True)
    assert parts is not None
    assert parts.aggregation is not None
    assert parts.aggregation.signers == tuple(keys.split(","))
    lines = [*describe_disclosure(cell, parts, 0)]
    assert "the keys of masks are signed by the nodes' keys, which the agreement lists" in lines


def test_clients_of_a_cell_encode_integers(tmp_path: Path) -> None:
    parts = check(config(*SECURE), elsewhere=False)
    assert parts is not None
    setup = make_site(parts, tmp_path).setup
    assert setup.secure == parts.aggregation
