"""Groups of clients that train, or draw images, in one computation (`trainer.fuse`)."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice, pairwise
from typing import Any, TypeAlias

from typing_extensions import TypeIs

from fedlight.federation.client import ClientSetup
from fedlight.federation.messages import Broadcast, Evaluation

Group: TypeAlias = tuple[Broadcast, ...]
"""Broadcasts to clients that train in one computation."""
EvaluationGroup: TypeAlias = tuple[Evaluation, ...]
"""Requests to clients whose models draw images in one computation."""


def make_groups(broadcasts: Iterable[Broadcast], setup: ClientSetup) -> list[Group]:
    """Groups the broadcasts of a round, up to `setup.fuse` clients a group.

    The clients of a group have the same number of batches; clients of similar size are grouped, so that few
    images are padded, and groups with as many batches are equally large, give or take one. Groups depend on
    the cohort and on the sizes of its clients alone: not on the number of workers, nor on which updates are
    done already. Where nothing is fused, each client is a group.

    Returns:
        Groups in the order of their first clients.
    """
    if setup.fuse == 1:
        return [(broadcast,) for broadcast in broadcasts]
    groups: list[Group] = []
    sized: list[tuple[int, int, Broadcast]] = []
    for broadcast in broadcasts:
        if broadcast.drops_out:
            groups.append((broadcast,))
        else:
            data = setup.data(broadcast.client)
            sized.append((len(data.train_dataloader()), data.num_examples, broadcast))
    sized.sort(key=_size)
    for _, same in groupby(sized, _batches):
        members = [broadcast for _, _, broadcast in same]
        groups += _split(members, -(-len(members) // setup.fuse))
    return sorted(groups, key=_first_client)


def group_evaluations(requests: Iterable[Evaluation], setup: ClientSetup) -> Iterator[EvaluationGroup]:
    """Groups requests in their order, up to `setup.drawn_together` models a group."""
    left = iter(requests)
    while group := tuple(islice(left, setup.drawn_together)):
        yield group


def is_evaluation(request: Group | EvaluationGroup) -> TypeIs[EvaluationGroup]:
    """Whether the messages of a group are requests to evaluate models."""
    return isinstance(request[0], Evaluation)


def count_images(group: Group, setup: ClientSetup) -> int:
    """Images that the clients of a group will train on."""
    return sum(setup.data(b.client).num_examples for b in group if not b.drops_out)


def _split(members: list[Broadcast], groups: int) -> list[Group]:
    """Splits a list into so many parts of equal length, give or take one."""
    borders = [len(members) * i // groups for i in range(groups + 1)]
    return [tuple(members[first:last]) for first, last in pairwise(borders)]


def _size(entry: tuple[int, int, Broadcast]) -> tuple[int, int, int]:
    batches, images, broadcast = entry
    return batches, images, broadcast.client


def _batches(entry: tuple[int, int, Any]) -> int:
    return entry[0]


def _first_client(group: Group) -> int:
    return min(broadcast.client for broadcast in group)
