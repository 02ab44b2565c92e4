"""A SuperNode for tests, which asks for messages often: HEARTBEAT OPTION ...; the heartbeat in seconds."""

import sys
import time
from types import SimpleNamespace

from flwr.supercore import heartbeat
from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode

interval = int(sys.argv.pop(1))
heartbeat.HEARTBEAT_DEFAULT_INTERVAL = fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = interval
for state in (
    in_memory_corestate,
    sql_corestate,
):  # a process that it starts has 30 s to be there, too few here
    state.HEARTBEAT_DEFAULT_INTERVAL = 300
start_client_internal.time = SimpleNamespace(
    sleep=lambda seconds: time.sleep(seconds / 10)
)  # it waits for 3 s
flower_supernode()
