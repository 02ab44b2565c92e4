"""Groups of clients that train, or draw images, in one computation (`trainer.fuse`)."""

from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import TypeAlias

from typing_extensions import TypeIs

from fedlight.federation.client import ClientSetup
from fedlight.federation.messages import Broadcast, Evaluation

Group: TypeAlias = tuple[Broadcast, ...]
"""Broadcasts to clients that train in one computation."""
EvaluationGroup: TypeAlias = tuple[Evaluation, ...]
"""Requests to clients whose models draw images in one computation."""
Sized: TypeAlias = tuple[int, int, Broadcast]
"""Batches of a local epoch and images of a client, and its broadcast."""
SHARE = 0.5  # of the batches of a group's largest client that its smallest one has at least


def make_groups(broadcasts: Iterable[Broadcast], setup: ClientSetup) -> list[Group]:
    """Groups the broadcasts of a round, up to `setup.fuse` clients a group.

    Clients with similar numbers of batches are grouped: where a group's client may leave it before the others
    (`setup.fuse_unequal`), each has at least half as many as the largest, so that at least half of a group
    computes at any time, and otherwise all have equally many. Among these, clients of similar size are
    grouped, so that few images are padded, and groups are equally large, give or take one. Groups depend on
    the cohort and on the sizes of its clients alone: not on the number of workers, nor on which updates are
    done already. Where nothing is fused, each client is a group.

    Returns:
        Groups in the order of their first clients; in a group the clients with most batches are first.
    """
    if setup.fuse == 1:
        return [(broadcast,) for broadcast in broadcasts]
    groups: list[Group] = []
    sized: list[Sized] = []
    for broadcast in broadcasts:
        if broadcast.drops_out:
            groups.append((broadcast,))
        else:
            data = setup.data(broadcast.client)
            sized.append((setup.count_batches(data), data.num_examples, broadcast))
    sized.sort(key=_size)
    for run in _similar(sized, SHARE if setup.fuse_unequal else 1):
        members = [broadcast for _, _, broadcast in run]
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


def _similar(sized: list[Sized], share: float) -> Iterator[list[Sized]]:
    """Splits clients in order of size where one has less than this share of the batches of a part's first."""
    part: list[Sized] = []
    for entry in sized:
        if part and entry[0] < share * part[0][0]:
            yield part
            part = []
        part.append(entry)
    if part:
        yield part


def _size(entry: Sized) -> tuple[int, int, int]:
    batches, images, broadcast = entry
    return -batches, -images, broadcast.client


def _first_client(group: Group) -> int:
    return min(broadcast.client for broadcast in group)
