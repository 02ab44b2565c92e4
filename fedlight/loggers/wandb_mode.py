"""Weights & Biases in the environment: online or offline mode, and the runs of an agent."""

import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SWEEP, RUN, PARAMETERS = "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"  # set by `wandb agent`
GROUP = "FEDLIGHT_WANDB_GROUP"  # group of a grid's cells, inherited by its processes and jobs


def wandb_mode() -> str:
    """WANDB_MODE if it is set, else `online` if a key is known, else `offline`."""
    return os.environ.get("WANDB_MODE") or ("online" if _key_known() else "offline")


@contextmanager
def runs_of_a_grid() -> Iterator[None]:
    """Gives each cell of a grid its own run if a W&B agent started the command.

    The agent's run id is for one run only. So the cells get ids as without an agent, in the group of its
    sweep, as W&B recommends for several runs of one command.
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
