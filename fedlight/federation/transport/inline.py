"""Clients one after another, in the process of the server."""

from collections.abc import Iterable, Iterator

from fedlight.federation.messages import Broadcast, Evaluation, Scores, Update, from_bytes
from fedlight.federation.transport.transport import TransportContext


class Inline:
    """The simplest transport: every client trains in this process."""

    def __init__(self, context: TransportContext) -> None:
        self._site = context.site

    def exchange(self, broadcasts: Iterable[Broadcast]) -> Iterator[Update]:
        for broadcast in broadcasts:
            if receipt := self._site.update(broadcast):
                yield from_bytes(receipt.read())

    def evaluate(self, requests: Iterable[Evaluation]) -> Iterator[Scores]:
        yield from map(self._site.evaluate, requests)
