"""What protects the clients of a cell: cohorts, noise on updates and on gradients, secure aggregation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import Callback

from fedlight.config import CellConfig
from fedlight.data.client_data import poisson_rate
from fedlight.data.partition import Indices
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.cohort import Participation
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.messages import State
from fedlight.federation.method import Method
from fedlight.federation.noise import SecretNoise, SeededNoise, note
from fedlight.federation.secure.fixed_point import FixedPoint
from fedlight.federation.secure.secure_sum import DiscreteNoise, SecureAggregation
from fedlight.federation.secure.sum_sizes import fewest_in_sum
from fedlight.federation.slices import SliceMap
from fedlight.privacy.example_level import PrivateGradients

CLIENT, EXAMPLE = "client", "example"
"""The kinds of privacy."""
RELEASES = "releases"  # in the checkpoint's folder: a byte for each release with secret noise


def make_participation(config: CellConfig) -> Participation:
    """Which clients take part in the rounds of a cell."""
    privacy = config.privacy
    return Participation(
        config.clients,
        config.fraction,
        config.federation.dropout,
        config.seed,
        poisson=privacy is not None and privacy.name == CLIENT,
        secret=privacy is not None and privacy.secure_noise,
    )


def make_mechanism(
    config: CellConfig, noise: float, checkpoint: Path | None = None
) -> GaussianMechanism | None:
    """How updates are clipped and noised under client-level privacy; None without it.

    Args:
        config: of the cell.
        noise: multiplier of the noise.
        checkpoint: the folder where the server counts its releases.
    """
    privacy = config.privacy
    if privacy is None or privacy.name != CLIENT:
        return None
    secret = SecretNoise(checkpoint / RELEASES if checkpoint else None)
    return GaussianMechanism(
        privacy.clip,
        noise,
        config.clients,
        config.fraction * config.clients,
        privacy.noise_at == "clients",
        privacy.clip_quantile,
        secret if privacy.secure_noise else SeededNoise(config.seed),
        summed=config.aggregation is not None,
    )


def make_aggregation(
    config: CellConfig, method: Method, slices: SliceMap, algorithm: FedAvg, noise: float, theta: State
) -> SecureAggregation | None:
    """How updates are encoded so that their sum alone is known; None without secure aggregation.

    Under client-level privacy the fewest clients in a sum have all the noise together. Rounding moves each
    of d numbers by less than one, so the largest norm in whole numbers is that of the clip plus sqrt(d).

    Args:
        config: of the cell.
        method: resolved over the slices.
        slices: the slice map of the model.
        algorithm: of the cell.
        noise: multiplier of the noise of `privacy`.
        theta: the first state_dict.
    """
    section, privacy = config.aggregation, config.privacy
    if section is None:
        return None
    fixed = FixedPoint(section.clip, section.bits, section.modulus_bits)
    nodes = listed_nodes(config)
    secure = SecureAggregation(
        fixed,
        section.threshold,
        slices,
        algorithm,
        config.seed,
        sums_loss=privacy is None,
        share=section.share,
        signers=tuple(map(str, nodes)) if isinstance(nodes, list) else None,
    )
    if privacy is None or privacy.name != CLIENT or not noise:
        return secure
    numbers = sum(secure.count_params(slice_, theta) for slice_ in method.uplink)
    largest = privacy.clip * fixed.scale + math.sqrt(numbers)
    share = math.sqrt(fewest_in_sum(section.threshold, config.clients))
    source = SecretNoise() if privacy.secure_noise else SeededNoise(config.seed)
    return replace(secure, noise=DiscreteNoise(noise * largest / share, source))


def listed_nodes(config: CellConfig) -> Any:
    """`transport.nodes`: fingerprints of the keys of clients' nodes, not checked; None for none."""
    return (config.transport.model_extra or {}).get("nodes") if config.transport else None


def make_private_training(
    config: CellConfig, noise: float, client_indices: Sequence[Indices], checkpoint: Path
) -> Callable[[int], Callback] | None:
    """Makes the callback that clips and noises a client's gradients; None without example-level privacy.

    Args:
        config: of the cell.
        noise: multiplier of the noise.
        client_indices: the images of each client that trains.
        checkpoint: the folder where a client counts its releases.
    """
    privacy = config.privacy
    if privacy is None or privacy.name != EXAMPLE:
        return None

    def make(client: int) -> Callback:
        images, batch = len(client_indices[client]), config.data.batch_size
        if privacy.secure_noise:
            note(checkpoint / f"{RELEASES}-{client:06d}")
        return PrivateGradients(
            noise,
            privacy.clip,
            poisson_rate(images, batch) * images,
            privacy.draws or 1,
            privacy.secure_noise,
        )

    return make
