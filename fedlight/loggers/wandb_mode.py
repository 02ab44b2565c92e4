"""Whether Weights & Biases is written to online or offline."""

import netrc
import os


def wandb_mode() -> str:
    """WANDB_MODE where it is set, else `online` where a key is known and `offline` where none is."""
    return os.environ.get("WANDB_MODE") or ("online" if _key_known() else "offline")


def _key_known() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
