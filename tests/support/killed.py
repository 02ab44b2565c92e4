"""A cell whose process is killed in the middle of a round."""

import os
import signal
from typing import Any

from conftest import SMALL, invoke

from fedlight.federation.site import Site


def run_killed(arguments: list[str], stored: int) -> None:
    """Runs a small cell in a process that is killed by SIGKILL as soon as so many updates are stored.

    Args:
        arguments: of `fedlight run`, beside those of SMALL.
        stored: calls of `Site.update`: of clients, where each trains by itself in the cell's own process.
    """
    if (child := os.fork()) == 0:
        updates, update = 0, Site.update

        def killed(site: Site, group: Any) -> Any:
            nonlocal updates
            updates += 1
            receipts = update(site, group)
            if updates == stored:
                os.kill(os.getpid(), signal.SIGKILL)
            return receipts

        Site.update = killed  # type: ignore[method-assign]
        invoke(*SMALL, *arguments)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
