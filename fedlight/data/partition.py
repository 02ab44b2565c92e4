"""Partitions: which training images each client holds.

The draws come from NumPy's legacy generator `RandomState(seed)`, so that the published partitions of
FedDiffuse (seed 2023, beta 0.5) come out to the image.
"""

from typing import TypeVar

import numpy as np
from hydra.utils import instantiate
from numpy.typing import NDArray

from fedlight.data.data_config import PartitionConfig
from fedlight.runtime.errors import BadInput

Labels = NDArray[np.int64]
Indices = NDArray[np.int64]
Number = TypeVar("Number", int, float)

DRAWS = 1_000


def assign(config: PartitionConfig, labels: Labels, clients: int) -> list[Indices]:
    """The training images of each client, by the partition that the configuration names.

    Args:
        config: the section `partition`.
        labels: of the training images, int64, shape (n,).
        clients: K, 1 or more.

    Returns:
        For each client the positions of its images, int64; no position occurs twice.

    Raises:
        BadInput: the partition cannot be made of these labels.
    """
    partition = instantiate(config.deal, _partial_=True)
    try:
        parts: list[Indices] = partition(labels, clients)
    except TypeError as error:
        raise BadInput(f"partition: {error}") from error
    return parts


def assign_all_to(labels: Labels, clients: int, client: int | None) -> list[Indices]:
    """Leaves all images, in their order, with one client; with nobody where `client` is None."""
    return [np.arange(len(labels) if number == client else 0) for number in range(clients)]


def iid(labels: Labels, clients: int, seed: int) -> list[Indices]:
    """Deals all images at random into shares of equal size, off by one at most.

    Raises:
        BadInput: fewer images than clients.
    """
    _require(labels, clients, minimum=1)
    return np.array_split(np.random.RandomState(seed).permutation(len(labels)), clients)


def quantity_skew(
    labels: Labels, clients: int, seed: int, beta: float | None, minimum: int = 10
) -> list[Indices]:
    """Deals all images at random into shares of sizes ~ Dirichlet(beta) (NIID-Bench, arXiv 2102.02079).

    Raises:
        BadInput: no beta, or no draw gave every client its minimum.
    """
    _require(labels, clients, minimum)
    beta = _given(beta, "beta", "a number above 0")
    rng, total = np.random.RandomState(seed), len(labels)
    shuffled = rng.permutation(total)
    for _ in range(DRAWS):
        shares = rng.dirichlet(np.repeat(beta, clients))
        if shares.min() * total >= minimum:
            cuts = (np.cumsum(shares) * total).astype(int)[:-1]
            return np.split(shuffled, cuts)
    raise _too_skewed(clients, beta, minimum)


def label_skew(
    labels: Labels, clients: int, seed: int, beta: float | None, minimum: int = 10
) -> list[Indices]:
    """Deals each class in shares ~ Dirichlet(beta), none to clients already full (NIID-Bench).

    Raises:
        BadInput: no beta, or no draw gave every client its minimum.
    """
    _require(labels, clients, minimum)
    beta = _given(beta, "beta", "a number above 0")
    rng = np.random.RandomState(seed)
    for _ in range(DRAWS):
        parts = _draw_label_skew(rng, labels, clients, beta)
        if min(map(len, parts)) >= minimum:
            for part in parts:
                rng.shuffle(part)
            return [np.array(part, dtype=np.int64) for part in parts]
    raise _too_skewed(clients, beta, minimum)


def _draw_label_skew(
    rng: np.random.RandomState, labels: Labels, clients: int, beta: float
) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        rng.shuffle(members)
        shares = rng.dirichlet(np.repeat(beta, clients))
        shares = shares * [len(part) < len(labels) / clients for part in parts]
        if not shares.sum() > 0:  # a tiny beta gave all of the class to full clients
            return [[] for _ in range(clients)]
        shares = shares / shares.sum()
        cuts = (np.cumsum(shares) * len(members)).astype(int)[:-1]
        for part, members_of_client in zip(parts, np.split(members, cuts), strict=True):
            part.extend(members_of_client)
    return parts


def shards(labels: Labels, clients: int, seed: int, classes: int | None) -> list[Indices]:
    """Gives each client the same number of classes and each class to its clients in equal shares.

    Raises:
        BadInput: more classes a client than there are, or too few to hand out every class.
    """
    _require(labels, clients, minimum=1)
    classes = _given(classes, "classes", "a whole number")
    rng, known = np.random.RandomState(seed), int(labels.max()) + 1
    fewest = -(-known // clients)
    if not fewest <= classes <= known:
        raise BadInput(
            f"partition.classes must be a whole number from {fewest} to {known}, so that {clients} clients "
            f"hold all {known} classes, got {classes}"
        )
    shuffled = rng.permutation(known)
    holders: list[list[int]] = [[] for _ in range(known)]
    for client in range(clients):
        for slot in range(client * classes, (client + 1) * classes):
            holders[shuffled[slot % known]].append(client)
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for label, clients_of_label in enumerate(holders):
        members = rng.permutation(np.flatnonzero(labels == label))
        for client, share in zip(
            clients_of_label, np.array_split(members, len(clients_of_label)), strict=True
        ):
            parts[client].append(share)
    joined = [np.concatenate(part) for part in parts]
    if not all(map(len, joined)):
        raise BadInput(f"partition shards cannot give each of {clients} clients an image: use fewer clients")
    return joined


def pool(parts: list[Indices]) -> Indices:
    """All clients' images in one place."""
    return np.concatenate(parts)


def count_labels(labels: Labels, parts: list[Indices], classes: int) -> NDArray[np.int64]:
    """Images of each client and label, shape (clients, classes)."""
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def _given(value: Number | None, key: str, allowed: str) -> Number:
    if value is None:
        raise BadInput(f"partition.{key} must be {allowed}, got null")
    return value


def _require(labels: Labels, clients: int, minimum: int) -> None:
    if clients * minimum > len(labels):
        raise BadInput(
            f"clients must be at most {len(labels) // minimum}: each needs at least {minimum} of the "
            f"{len(labels)} training images, got {clients}"
        )


def _too_skewed(clients: int, beta: float, minimum: int) -> BadInput:
    return BadInput(
        f"partition: none of {DRAWS} draws gave each of {clients} clients {minimum} images: "
        f"use fewer clients or a partition.beta above {beta}"
    )
