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
# A process that it starts has 30 s to be there, too few on a busy machine.
in_memory_corestate.HEARTBEAT_DEFAULT_INTERVAL = sql_corestate.HEARTBEAT_DEFAULT_INTERVAL = 300
# It waits for 3 s between two questions.
start_client_internal.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10))
flower_supernode()
