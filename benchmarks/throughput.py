"""The cost of an update of very many clients with few steps: fedlight's transports and Flower's simulation.

pip install -e '.[bench,cluster]' && python benchmarks/throughput.py [--quick] [--out FILE.json]

100,000 clients of one or two digits, of which 1,000 (with --quick 200) take one local epoch, a single step of
the tiny UNet, in each of two rounds; two worker processes. The second round is timed, inside each engine; the
steps by themselves in a bare loop. "Written" counts the writes of a run's processes to disk, without Ray's.
"""

import resource
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import parser, show, write
from peer_environments import FLOWER, Missing, python_of
from peer_workers import federation as federations
from peers import (
    WORKERS,
    Measurement,
    Scenario,
    check_equal,
    make_federation,
    run_fedlight,
    run_worker,
    script,
)

CLIENTS = 100_000
TRANSPORTS = ("processes", "dask")


def writing(act: Callable[[], Measurement]) -> tuple[Measurement, float]:
    """A measurement, and the MB that its processes wrote to disk."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock
    measured = act()
    return measured, (resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock - before) * 512 / 1e6


def main() -> None:
    given = parser(__doc__).parse_args()
    try:
        flower = python_of(FLOWER)
    except Missing as reason:
        sys.exit(f"Flower cannot be measured: {reason}")
    updates = 200 if given.quick else 1_000
    work = (f"clients={CLIENTS}", f"fraction={updates / CLIENTS}", "epochs=1")
    settings = Scenario("", work, copies=70).settings(rounds=2)
    federation = make_federation(settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "federation.safetensors")
        federations.write(federation, path)
        bare = run_worker(path, Path(sys.executable), script("bare_loop.py"))
        acts = {"Flower": partial(run_worker, path, flower, script("run_flower.py"))}
        for name in TRANSPORTS:
            acts[name] = partial(run_fedlight, federation, [*settings, f"transport={name}"])
        results = {name: writing(act) for name, act in acts.items()}
    check_equal({name: measured for name, (measured, _) in results.items()}, federation, TRANSPORTS[0])
    alone, theirs = bare.round / WORKERS, results["Flower"][0].round
    show(
        f"a round of {updates} updates of one step, {CLIENTS:,} clients, {WORKERS} processes",
        ["", "ms an update", "beside its step", "MB/s written", "times as fast as Flower"],
        [
            [
                name,
                f"{1e3 * measured.round / updates:.1f}",
                f"{1e3 * (measured.round - alone) / updates:.1f}",
                "" if name == "Flower" else f"{written / sum(measured.seconds):.1f}",
                f"{theirs / measured.round:.2f}x",
            ]
            for name, (measured, written) in results.items()
        ],
    )
    ratios = {f"Flower over {name}": theirs / results[name][0].round for name in TRANSPORTS}
    seconds = {name: [measured.round, written] for name, (measured, written) in results.items()}
    write(given.out, ratios, {"seconds": seconds, "steps": alone})


if __name__ == "__main__":
    main()
