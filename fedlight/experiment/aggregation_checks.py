"""Checks of the section `aggregation` and all others: each raises BadInput with the way out."""

import math
from collections.abc import Iterator
from typing import Any

from fedlight.config import CellConfig
from fedlight.experiment.mechanisms import CLIENT
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.cohort import Participation
from fedlight.federation.messages import State
from fedlight.federation.method import Method
from fedlight.federation.secure.secure_sum import SecureAggregation, check_whole
from fedlight.federation.secure.sum_sizes import count_reporters, smallest_sums
from fedlight.runtime.errors import BadInput

TAIL = 8  # standard deviations of noise that a sum must have room for; more occur once in 10^15 numbers


def check_aggregation(
    config: CellConfig,
    secure: SecureAggregation,
    method: Method,
    participation: Participation,
    first: State,
    sizes: list[int],
) -> None:
    """Rejects configurations in which a sum cannot be taken, or is that of too few clients.

    Args:
        config: of the cell.
        secure: how updates are summed.
        method: resolved over the slices.
        participation: who takes part in which round.
        first: the first state_dict.
        sizes: images of each client that trains; 0 where they are on another machine.
    """
    check_sections(config)
    _check_requirements(_requirements(secure, method, first))
    check_sums(config, method, participation, tuple(secure.slices.names))
    _check_modulus(config, secure, participation, sizes)


def check_sections(config: CellConfig) -> None:
    """Raises BadInput where the sections `transform` and `privacy` do not go together with it."""
    private = config.privacy if config.privacy and config.privacy.name == CLIENT else None
    _check_requirements(
        {
            "a transform without stages for the uplink (transform.up=[]): scales, positions and codes of one "
            "client do not add up; aggregation.bits is what quantises": (
                config.transform and config.transform.up
            ),
            "privacy.noise_at=clients: the server sees no update that it could clip": (
                private and private.noise_at != "clients"
            ),
            f"fraction=1 under privacy=client, got {config.fraction:g}: the server draws the cohort, so that "
            "sampling hides no client from it": private and config.fraction < 1,
        }
    )


def _check_requirements(requirements: dict[str, Any]) -> None:
    for requirement, violated in requirements.items():
        if violated:
            raise BadInput(f"aggregation=secure needs {requirement}")


def _requirements(secure: SecureAggregation, method: Method, first: State) -> dict[str, Any]:
    algorithm, slices = secure.algorithm, secure.slices
    unsent = [slice_ for slice_ in method.uplink if slice_ not in method.downlink]
    reported = [name for slice_ in slices.names for name in slices.names[slice_]]
    buffers = [name for name in reported if name in slices.buffers or not first[name].is_floating_point()]
    aux_like = algorithm.aux_like(slices.parameters(slices.select(slices.names, first)))
    undeclared = type(algorithm).report is not FedAvg.report and not aux_like
    names = set(reported)
    shared = [name for name in aux_like if name.split("/", 1)[-1] not in names]
    return {
        "a method whose clients report: CENTRAL and LOCAL have none": method.pool or not method.uplink,
        f"a method that sends down what clients report: {', '.join(unsent)} is not": unsent,
        f"parameters alone: {', '.join(buffers)} is a buffer or holds whole numbers, which have no sum in "
        "fixed point": buffers,
        "an algorithm that takes the plain mean of what clients report": (
            type(algorithm).summand is not FedAvg.summand
        ),
        "an algorithm that declares by aux_like what clients report beside the slices": undeclared,
        f"aggregation.share=1 with an algorithm that has auxiliary state, got {secure.share:g}: a part of it "
        "would not fit the rest": aux_like and secure.share < 1,
        f"auxiliary state that belongs to a slice: {', '.join(shared)} is of the whole model": shared,
    }


def check_sums(
    config: CellConfig, method: Method, participation: Participation, slices: tuple[str, ...]
) -> None:
    """Raises BadInput where a slice is to be reported by fewer clients than a sum may have.

    Args:
        config: of the cell.
        method: resolved over the slices.
        participation: who takes part in which round.
        slices: of the model.
    """
    assert config.aggregation
    threshold = config.aggregation.threshold
    for round_, planned in planned_rounds(config, method, participation, slices):
        fewest = smallest_sums(planned, threshold)
        for slice_, reporters in count_reporters(planned).items():
            if reporters < fewest[slice_]:
                whose = "that client's update" if reporters == 1 else "of too few"
                raise BadInput(
                    f"aggregation=secure: in round {round_} slice {slice_} is reported by {reporters} of "
                    f"{len(planned)} clients, and a sum has {fewest[slice_]} at least "
                    f"(aggregation.threshold={_plain(threshold)}): its sum would be {whose}; choose "
                    "more clients, a larger fraction, or a method in which more of them report the slice"
                )


def planned_rounds(
    config: CellConfig, method: Method, participation: Participation, slices: tuple[str, ...]
) -> Iterator[tuple[int, dict[int, tuple[str, ...]]]]:
    """Each round of a cell, from 1, and for its clients the slices that they are to report.

    Args:
        config, method, participation, slices: as for `check_sums`.
    """
    for round_ in range(1, config.rounds + 1):
        yield round_, planned_uplinks(method.in_round(round_, slices), participation, round_)


def planned_uplinks(method: Method, participation: Participation, round_: int) -> dict[int, tuple[str, ...]]:
    """Client: the slices that it is to report in a round.

    A secret cohort consists of all clients: under client-level privacy secure aggregation needs fraction=1.

    Args:
        method: with the slices of the round.
        participation: who takes part.
        round_: 1..R.
    """
    if participation.secret:
        return dict.fromkeys(range(participation.clients), tuple(method.uplink))
    return {task.client: task.uplink for task in participation.draw(method, round_)[1]}


def _check_modulus(
    config: CellConfig, secure: SecureAggregation, participation: Participation, sizes: list[int]
) -> None:
    """Raises BadInput where the largest possible sum of a cohort exceeds the modulus."""
    fixed, cohort = secure.fixed, participation.cohort_size
    private = config.privacy is not None and config.privacy.name == CLIENT
    weights = [1] if private else [check_whole(secure.algorithm.weight(size)) for size in sizes if size]
    largest = max(weights, default=1)
    needed = cohort * largest * fixed.levels
    noise = ""
    if secure.noise:
        room = math.ceil(TAIL * secure.noise.deviation * math.sqrt(cohort))
        needed, noise = needed + room, f" and {room:,} for noise"
    if needed > fixed.largest_sum:
        raise BadInput(
            f"aggregation.modulus_bits={fixed.modulus_bits} holds sums up to {fixed.largest_sum:,}, and "
            f"{cohort} clients of weight {largest:,} at aggregation.bits={fixed.bits} reach "
            f"{cohort * largest * fixed.levels:,}{noise}: increase aggregation.modulus_bits or decrease "
            "aggregation.bits"
        )


def _plain(threshold: int | None) -> str:
    return "null" if threshold is None else str(threshold)
