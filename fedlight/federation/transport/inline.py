"""Clients one after another, in the process of the server."""

from collections.abc import Iterable, Iterator

from fedlight.federation.grouping import group_evaluations, make_groups
from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update
from fedlight.federation.transport.transport import TransportContext


class Inline:
    """The simplest transport: every client, or group of clients, trains in this process."""

    def __init__(self, context: TransportContext) -> None:
        self._site = context.site

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        for group in make_groups(broadcasts, self._site.setup):
            yield from (self._site.read(receipt) for receipt in self._site.update(group) if receipt)

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        for group in group_evaluations(requests, self._site.setup):
            yield from self._site.evaluate_group(group)
