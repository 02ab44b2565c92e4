"""A SuperLink for tests, on a busy machine: a process that Flower starts has 300 s to be there, not 30."""

import sys

from flwr.superlink.cli import flower_superlink

for name, module in tuple(sys.modules.items()):
    if name.startswith("flwr.") and hasattr(module, "HEARTBEAT_DEFAULT_INTERVAL"):
        module.HEARTBEAT_DEFAULT_INTERVAL = 300
flower_superlink()
