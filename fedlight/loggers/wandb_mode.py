"""What the environment says about Weights & Biases: online or offline, and whose run a cell is."""

import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SWEEP, RUN, PARAMETERS = "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"  # set by `wandb agent`
GROUP = "FEDLIGHT_WANDB_GROUP"  # the group of a grid's cells, also in processes and jobs that it starts


def wandb_mode() -> str:
    """WANDB_MODE where it is set, else `online` where a key is known and `offline` where none is."""
    return os.environ.get("WANDB_MODE") or ("online" if _key_known() else "offline")


@contextmanager
def runs_of_a_grid() -> Iterator[None]:
    """Gives each cell of a grid a run of its own where a W&B agent started the command.

    The agent's run id is one run's. The cells get ids as without an agent, and its sweep is their group, as
    W&B advises for several runs of one agent's command.
    """
    if SWEEP not in os.environ:
        yield
        return
    agents = {name: os.environ.pop(name) for name in (SWEEP, RUN, PARAMETERS) if name in os.environ}
    os.environ[GROUP] = agents[SWEEP]
    try:
        yield
    finally:
        del os.environ[GROUP]
        os.environ |= agents


def _key_known() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
