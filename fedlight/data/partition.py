"""Partitions: the assignment of training images to clients.

Random numbers come from NumPy's legacy generator `RandomState(seed)`, which reproduces the published
partitions of FedDiffuse (seed 2023, beta 0.5) image by image.
"""

import inspect
from typing import TypeVar

import numpy as np
from hydra.utils import instantiate
from numpy.typing import NDArray

from fedlight.data.data_config import PartitionConfig
from fedlight.runtime.errors import BadInput

Labels = NDArray[np.int64]
Indices = NDArray[np.int64]
"""Positions of one client's images in the training set, shape (n_k,)."""
Number = TypeVar("Number", int, float)

DRAWS = 1_000  # of proportions, until every client has its minimum


def assign(
    config: PartitionConfig, labels: Labels, clients: int, groups: Labels | None = None
) -> list[Indices]:
    """The training images of each client, by the partition that the configuration names.

    Args:
        config: the section `partition`.
        labels: of the training images, int64, shape (n,).
        clients: K, 1 or more.
        groups: whose image each is, int64, shape (n,), for a partition with a parameter of that name; None
            where the data set does not say.

    Returns:
        For each client the positions of its images, int64; no position occurs twice.

    Raises:
        BadInput: the partition cannot be made of these labels.
    """
    partition = instantiate(config.deal, _partial_=True)
    by_group = "groups" in inspect.signature(partition.func).parameters
    try:
        parts: list[Indices] = partition(labels, clients, **({"groups": groups} if by_group else {}))
    except TypeError as error:
        raise BadInput(f"partition: {error}") from error
    return parts


def assign_all_to(labels: Labels, clients: int, client: int | None) -> list[Indices]:
    """Leaves all images, in their order, with one client; with nobody where `client` is None."""
    return [np.arange(len(labels) if number == client else 0) for number in range(clients)]


def iid(labels: Labels, clients: int, seed: int) -> list[Indices]:
    """Assigns all images at random; the clients' numbers of images differ by one at most.

    Raises:
        BadInput: fewer images than clients.
    """
    _check_size(labels, clients, minimum=1)
    return np.array_split(np.random.RandomState(seed).permutation(len(labels)), clients)


def quantity_skew(
    labels: Labels, clients: int, seed: int, beta: float | None, minimum: int = 10
) -> list[Indices]:
    """Assigns images at random in proportions ~ Dirichlet(beta) (NIID-Bench, arXiv 2102.02079).

    Raises:
        BadInput: `beta` is None, or none of DRAWS draws gave every client its minimum.
    """
    _check_size(labels, clients, minimum)
    beta = _require_value(beta, "beta", "a number above 0")
    rng, total = np.random.RandomState(seed), len(labels)
    shuffled = rng.permutation(total)
    for _ in range(DRAWS):
        proportions = rng.dirichlet(np.repeat(beta, clients))
        if proportions.min() * total >= minimum:
            cuts = (np.cumsum(proportions) * total).astype(int)[:-1]
            return np.split(shuffled, cuts)
    raise _skew_error(clients, beta, minimum)


def label_skew(
    labels: Labels, clients: int, seed: int, beta: float | None, minimum: int = 10
) -> list[Indices]:
    """Assigns each class in proportions ~ Dirichlet(beta) (NIID-Bench, arXiv 2102.02079).

    A client that has its equal share of all images gets none of the further classes.

    Raises:
        BadInput: `beta` is None, or none of DRAWS draws gave every client its minimum.
    """
    _check_size(labels, clients, minimum)
    beta = _require_value(beta, "beta", "a number above 0")
    rng = np.random.RandomState(seed)
    for _ in range(DRAWS):
        parts = _draw_label_skew(rng, labels, clients, beta)
        if min(map(len, parts)) >= minimum:
            for part in parts:
                rng.shuffle(part)
            return [np.array(part, dtype=np.int64) for part in parts]
    raise _skew_error(clients, beta, minimum)


def _draw_label_skew(
    rng: np.random.RandomState, labels: Labels, clients: int, beta: float
) -> list[list[int]]:
    """One draw of `label_skew`; all clients are empty where a class could be assigned to no client."""
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        rng.shuffle(members)
        proportions = rng.dirichlet(np.repeat(beta, clients))
        proportions = proportions * [len(part) < len(labels) / clients for part in parts]
        if not proportions.sum() > 0:  # a tiny beta assigned the whole class to full clients
            return [[] for _ in range(clients)]
        proportions = proportions / proportions.sum()
        cuts = (np.cumsum(proportions) * len(members)).astype(int)[:-1]
        for part, members_of_client in zip(parts, np.split(members, cuts), strict=True):
            part.extend(members_of_client)
    return parts


def shards(labels: Labels, clients: int, seed: int, classes: int | None) -> list[Indices]:
    """Assigns each client the same number of classes, and divides each class equally among its clients.

    Raises:
        BadInput: `classes` is None, more than there are, or too few to assign every class.
    """
    _check_size(labels, clients, minimum=1)
    classes = _require_value(classes, "classes", "a whole number")
    rng, total = np.random.RandomState(seed), int(labels.max()) + 1
    least = -(-total // clients)
    if not least <= classes <= total:
        raise BadInput(
            f"partition.classes must be a whole number from {least} to {total}, so that {clients} clients "
            f"hold all {total} classes, got {classes}"
        )
    shuffled = rng.permutation(total)
    clients_of: list[list[int]] = [[] for _ in range(total)]
    for client in range(clients):
        for slot in range(client * classes, (client + 1) * classes):
            clients_of[shuffled[slot % total]].append(client)
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for label, owners in enumerate(clients_of):
        members = rng.permutation(np.flatnonzero(labels == label))
        for client, part in zip(owners, np.array_split(members, len(owners)), strict=True):
            parts[client].append(part)
    joined = [np.concatenate(part) for part in parts]
    if not all(map(len, joined)):
        raise BadInput(
            f"partition=shards leaves some of {clients} clients without an image: use fewer clients"
        )
    return joined


def natural(labels: Labels, clients: int, seed: int, groups: Labels | None) -> list[Indices]:
    """Assigns each client the images of one group, such as a site; of several where clients are fewer.

    Groups go by their number of images, the largest first, to the client with the fewest images; with as many
    clients as groups, client k has group k. `seed` has no effect.

    Raises:
        BadInput: the data set has no groups, or fewer of them than there are clients.
    """
    if groups is None:
        raise BadInput(
            "partition=natural needs a column that says whose image it is: data=huggingface with "
            "data.client_column=COLUMN"
        )
    present, members = np.unique(groups, return_inverse=True)
    if clients > len(present):
        raise BadInput(
            f"partition=natural: the training images are of {len(present)} groups, so clients must be at "
            f"most {len(present)}, got {clients}"
        )
    sizes = np.bincount(members)
    owner = np.arange(len(present))
    if clients < len(present):
        load = np.zeros(clients, np.int64)
        for group in np.argsort(-sizes, kind="stable"):
            owner[group] = load.argmin()
            load[owner[group]] += sizes[group]
    return [np.flatnonzero(owner[members] == client) for client in range(clients)]


def pool(parts: list[Indices]) -> Indices:
    """The images of all clients together."""
    return np.concatenate(parts)


def count_labels(labels: Labels, parts: list[Indices], classes: int) -> NDArray[np.int64]:
    """The number of images of each client and label, shape (clients, classes)."""
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def _require_value(value: Number | None, key: str, allowed: str) -> Number:
    if value is None:
        raise BadInput(f"partition.{key} must be {allowed}, got null")
    return value


def _check_size(labels: Labels, clients: int, minimum: int) -> None:
    if clients * minimum > len(labels):
        raise BadInput(
            f"clients must be at most {len(labels) // minimum}: each needs at least {minimum} of the "
            f"{len(labels)} training images, got {clients}"
        )


def _skew_error(clients: int, beta: float, minimum: int) -> BadInput:
    return BadInput(
        f"partition: none of {DRAWS} draws gave each of {clients} clients {minimum} images: "
        f"use fewer clients or a partition.beta above {beta}"
    )
