"""Seconds from a command to its first training step, beside the loading time of the libraries alone.

python benchmarks/startup.py [--quick] [--out FILE.json]
"""

from functools import partial

from common import in_turns, parser, show, typed, write

LIBRARIES = "import torch, lightning.pytorch, diffusers"
TO_FIRST_STEP = """
import os, sys
from fedlight import run
from fedlight.diffusion import ddpm
ddpm.DDPM.training_step = lambda *given: os._exit(0)
sys.argv = ["fedlight.run", *sys.argv[1:]]
run.main()
"""


def main() -> None:
    given = parser(__doc__).parse_args()
    commands = {
        "python -m fedlight.run --help": ["-m", "fedlight.run", "--help"],
        "import torch, lightning, diffusers": ["-c", LIBRARIES],
        "first step, logger=none": ["-c", TO_FIRST_STEP, "logger=none"],
        "first step, W&B offline": ["-c", TO_FIRST_STEP],
    }

    seconds = in_turns(
        {name: partial(typed, *command) for name, command in commands.items()}, 2 if given.quick else 5
    )
    libraries = seconds["import torch, lightning, diffusers"]
    show(
        "start-up: seconds of a process",
        ["", "seconds", "in library imports"],
        [[name, f"{value:.2f}", f"{value / libraries:.2f}x"] for name, value in seconds.items()],
    )
    ratios = {
        "start-up, libraries over first step": libraries / seconds["first step, logger=none"],
        "start-up, libraries over --help": libraries / seconds["python -m fedlight.run --help"],
    }
    write(given.out, ratios, {"seconds": seconds})


if __name__ == "__main__":
    main()
