"""The tasks of a worker process: answers to messages, at the site of a cell."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from uuid import uuid4

from fedlight.federation.journal import Receipt
from fedlight.federation.messages import Evaluation, Scores, from_bytes, to_bytes
from fedlight.federation.site import Site
from fedlight.federation.transport.scheduler import Request
from fedlight.runtime.usage import Usage, UsageMeter


class SiteCache:
    """Keeps the site of the cell that this process worked for last."""

    def __init__(self) -> None:
        self._lock = Lock()  # a local update seeds the whole process, so that threads of a worker take turns
        self._made: tuple[Callable[[], Site], Site] | None = None
        self._process = uuid4().hex

    @contextmanager
    def opened(self, make_site: Callable[[], Site]) -> Iterator[Site]:
        """The site that `make_site` makes, for one task at a time."""
        with self._lock:
            if self._made is None or self._made[0] != make_site:
                self._made = None  # frees the memory of the other model first
                self._meter = UsageMeter(self._process)
                self._made = make_site, make_site()
                gc.enable()
            yield self._made[1]

    def usage(self, site: Site) -> Usage:
        """What this process has used for the cell of the site that it has made."""
        return self._meter.read(site.setup.drawing.take())


SITE_CACHE = SiteCache()


def prepare(make_site: Callable[[], Site]) -> None:
    """Makes the site, so that the first message finds it."""
    with SITE_CACHE.opened(make_site):
        pass


def write(request: Request) -> list[bytes]:
    """The bytes of an evaluation, or of the broadcasts of a group."""
    return [to_bytes(message) for message in ((request,) if isinstance(request, Evaluation) else request)]


def answer(
    make_site: Callable[[], Site], contents: Sequence[bytes]
) -> tuple[list[Receipt | None] | Scores, Usage]:
    """Answers what `write` returned; says what this process has used."""
    messages = [from_bytes(content) for content in contents]
    with SITE_CACHE.opened(make_site) as site:
        answered = site.answer(messages[0] if isinstance(messages[0], Evaluation) else messages)
        return answered, SITE_CACHE.usage(site)
