"""The commands of fedlight.sweeps, called in this process."""

import sys
from dataclasses import replace

import pytest

from fedlight import sweeps
from fedlight.runtime.process_record import describe_this_process

DEAD = replace(describe_this_process(), started="1")


def call(*arguments: str) -> int:
    """Runs `python -m fedlight.sweeps ARGUMENTS` in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedlight.sweeps", *arguments])
        with pytest.raises(SystemExit) as stop:
            sweeps.main()
    return int(stop.value.code or 0)
