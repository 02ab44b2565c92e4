"""fedlight against Flower's simulation engine: the same model, data and settings, start-up included.

pip install -e '.[bench]' && python benchmarks/flower.py [--quick] [--out FILE.json]

Five clients, three rounds of one local epoch on digits, FULL. Both are commands typed into a shell; Flower's
clients are plain PyTorch loops, one per core.
"""

import json
import os
from functools import partial

from common import in_turns, parser, show, typed, write

SETTINGS = ["clients=5", "rounds=3", "epochs=1", "data.batch_size=16", "logger=none"]
SETTINGS += ["evaluation.samples=0", "evaluation.grid=0"]


def main() -> None:
    given = parser(__doc__).parse_args()
    os.environ["SETTINGS"] = json.dumps(SETTINGS)
    seconds = in_turns(
        {
            "Flower": partial(typed, "-c", "import flower_app; flower_app.run()", sign="FINISHED"),
            "fedlight": partial(typed, "-m", "fedlight.run", *SETTINGS, sign="loss 0."),
        },
        repeats=1 if given.quick else 3,
    )
    ratio = seconds["Flower"] / seconds["fedlight"]
    show(
        "5 clients, 3 rounds of one local epoch, digits, FULL, start-up included",
        ["", "seconds", "against Flower"],
        [[name, f"{value:.1f}", f"{seconds['Flower'] / value:.2f}x"] for name, value in seconds.items()],
    )
    write(given.out, {"Flower over fedlight": ratio}, {"seconds": seconds})


if __name__ == "__main__":
    main()
