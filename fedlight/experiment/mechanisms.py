"""What protects the clients of a cell: its cohorts, its noise on updates, its noise on gradients."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning import Callback

from fedlight.config import CellConfig
from fedlight.data.client_data import poisson_rate
from fedlight.data.partition import Indices
from fedlight.federation.cohort import Participation
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.noise import SecretNoise, SeededNoise, note
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
    )


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
