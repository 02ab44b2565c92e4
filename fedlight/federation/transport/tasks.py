"""The tasks of a worker process: answers to messages, at the site of a cell."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any, NamedTuple
from uuid import uuid4

from fedlight.federation.journal import Receipt
from fedlight.federation.messages import Scores, from_bytes, to_bytes
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


class Written(NamedTuple):
    """A message of a group.

    Attributes:
        content: its bytes, without payloads that an earlier message of the group has.
        like: the place of that message in the group; its own place where it has its payloads.
    """

    content: bytes
    like: int


def write(request: Request) -> list[Written]:
    """The bytes of the messages of a group; payloads that they share are written once."""
    places: dict[int, int] = {}
    written = []
    messages: Sequence[Any] = request
    for place, message in enumerate(messages):
        like = places.setdefault(id(message.payloads), place)
        written.append(Written(to_bytes(message if like == place else replace(message, payloads={})), like))
    return written


def read(written: Sequence[Written]) -> Request:
    """The messages of a group, as `write` wrote them; what they shared they share again."""
    messages: list[Any] = []
    for place, (content, like) in enumerate(written):
        message = from_bytes(content)
        messages.append(message if like == place else replace(message, payloads=messages[like].payloads))
    return tuple(messages)


def answer(
    make_site: Callable[[], Site], written: Sequence[Written]
) -> tuple[list[Receipt | None] | list[Scores], Usage]:
    """Answers what `write` returned; says what this process has used."""
    request = read(written)
    with SITE_CACHE.opened(make_site) as site:
        answers = site.answer(request)
        site.discard()
        return answers, SITE_CACHE.usage(site)
