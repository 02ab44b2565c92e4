"""What a worker does with a message, at the site of a cell, which it makes once."""

import gc
from collections.abc import Callable
from threading import Lock
from typing import Any

from fedlight.federation.journal import Receipt
from fedlight.federation.messages import Scores, from_bytes
from fedlight.federation.site import Site

_site: tuple[Callable[[], Site], Site] | None = None  # of the cell that this worker worked for last
_one = Lock()  # a local update seeds the whole process, so that threads of a worker take turns


def act(make_site: Callable[[], Site], task: Callable[[Site], Any]) -> Any:
    """Does something with the site of a cell."""
    global _site
    with _one:
        if _site is None or _site[0] != make_site:
            _site = None
            _site = make_site, make_site()
            gc.enable()
        return task(_site[1])


def prepare(site: Site) -> None:
    """Only makes the site."""


def update(content: bytes, site: Site) -> Receipt | None:
    """Answers a broadcast."""
    return site.update(from_bytes(content))


def evaluate(content: bytes, site: Site) -> Scores:
    """Answers an evaluation."""
    return site.evaluate(from_bytes(content))
