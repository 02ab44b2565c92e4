"""How many clients a sum must have at least, and how many can undo masks together."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping


def fewest_in_sum(threshold: int | None, planned: int) -> int:
    """The fewest clients in a sum that the server may learn.

    Args:
        threshold: `aggregation.threshold`; None for two thirds of the planned clients, rounded up.
        planned: clients that are to report the slice in the round.
    """
    return max(2, threshold or -(-2 * planned // 3))


def fewest_that_unmask(threshold: int | None, cohort: int) -> int:
    """How many clients of a cohort can reveal a secret of one of them together (Shamir's threshold).

    It is more than half of the cohort: so the server, which receives one kind of share of a client from each
    other client, never has enough of both kinds (Bonawitz et al. 2017, section 6.2).
    """
    return max(fewest_in_sum(threshold, cohort), cohort // 2 + 1)


def count_reporters(uplinks: Mapping[int, tuple[str, ...]]) -> Counter[str]:
    """The number of clients that are to report each slice, from the slices of each client."""
    return Counter(slice_ for uplink in uplinks.values() for slice_ in uplink)


def group_slices(planned: Mapping[int, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The slices that the same clients are to report; they share their masks, since all are summed, or none.

    Args:
        planned: client: the slices that it is to report in the round.

    Returns:
        The slices of each group, sorted, by the first of them.
    """
    reporters: dict[str, list[int]] = {}
    for client in sorted(planned):
        for slice_ in planned[client]:
            reporters.setdefault(slice_, []).append(client)
    groups: dict[tuple[int, ...], list[str]] = {}
    for slice_ in sorted(reporters):
        groups.setdefault(tuple(reporters[slice_]), []).append(slice_)
    return {slices[0]: tuple(slices) for slices in groups.values()}


def groups_of(groups: Iterable[str], uplink: Collection[str]) -> list[str]:
    """Of the groups of a round, those that a client with this uplink reports, in their order."""
    return [group for group in groups if group in uplink]


def smallest_sums(uplinks: Mapping[int, tuple[str, ...]], threshold: int | None) -> dict[str, int]:
    """Slice: the fewest clients in its sum of a round."""
    counts = count_reporters(uplinks)
    return {slice_: fewest_in_sum(threshold, planned) for slice_, planned in counts.items()}
