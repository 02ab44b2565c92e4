"""fedlight beside other frameworks: pfl-research, BlazeFL and Flower's simulation on the same federations.

pip install -e '.[bench]' && python benchmarks/peers.py [--quick] [--setup] [--out FILE.json]

Each framework runs in its own environment, which uv makes in the cache the first time (--setup does only
this). All train the same UNet from the same weights on the same images, partition and cohorts, with the same
optimizer, batches and random draws: steps, images, parameters, loss and the final weights are compared, and a
difference ends the benchmark. Each system is a command of its own, one after the other; a round is timed
inside, from the second one on. Two processes or threads train clients, of one thread each.
"""

import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from common import ROOT, composed, parser, show, write
from hydra.errors import HydraException
from peer_environments import BLAZEFL, FLOWER, PFL, Environment, Missing, python_of
from peer_workers import federation as federations
from peer_workers.federation import Federation
from process_tree import Run, run
from safetensors.torch import load_file
from torch import Tensor

from fedlight.data.loading import load
from fedlight.experiment.setup import assemble
from fedlight.federation.cohort import draw_cohort
from fedlight.runtime.errors import BadInput
from fedlight.runtime.seeds import derive_seed

WORKERS = 2
HERE = Path(__file__).parent
SETTINGS = [f"trainer.workers={WORKERS}", "trainer.accelerator=cpu", "logger=none"]
SETTINGS += ["evaluation.samples=0", "evaluation.grid=0"]
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{HERE}:{HERE / 'peer_workers'}",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default is 15: its workers would get less of a busy machine
}
REFERENCE = "fedlight, processes"
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-3


@dataclass(frozen=True)
class Scenario:
    """A federation; `overrides` are those of a cell, without the number of rounds."""

    title: str
    overrides: tuple[str, ...]
    copies: int = 1  # of the digits, to have enough images for many clients

    def settings(self, rounds: int) -> list[str]:
        source = ["data.source._target_=many_digits.load", f"+data.source.copies={self.copies}"]
        return [*self.overrides, f"rounds={rounds}", *source, *SETTINGS]


SCENARIOS = (
    Scenario(
        "1,000 clients of 14 digits, 100 a round, 1 step each",
        ("clients=1000", "fraction=0.1", "epochs=1"),
        copies=10,
    ),
    Scenario(
        "200 clients of 14 digits, 50 a round, 4 steps each",
        ("clients=200", "fraction=0.25", "epochs=4"),
        copies=2,
    ),
    Scenario("5 clients of 287 digits, all in each round, 36 steps each", ("clients=5", "epochs=2")),
)


@dataclass(frozen=True)
class Measurement:
    """A run of a system.

    Attributes:
        seconds: of each round.
        outside: seconds of the command outside its rounds: start-up and end.
        peak_mb, peak_rss_mb: of its processes, as in `Run`.
        loss: mean of an image in the last round.
        steps: optimizer steps of all rounds.
        images: of these steps.
        weights: of the global UNet after the last round.
        reported: parameters and bytes that were exchanged, where the system counts them.
    """

    seconds: list[float]
    outside: float
    peak_mb: float
    peak_rss_mb: float
    loss: float
    steps: int
    images: int
    weights: dict[str, Tensor]
    reported: dict[str, int] = field(default_factory=dict)

    @property
    def round(self) -> float:
        """Median seconds of a round after the first."""
        return statistics.median(self.seconds[1:])


def script(name: str) -> str:
    """The path of a worker script."""
    return str(HERE / "peer_workers" / name)


def make_federation(settings: Sequence[str]) -> Federation:
    """The work of a cell, for other frameworks."""
    _, config = composed(*settings)
    parts = assemble(config, load(config.data))
    rounds = range(1, config.rounds + 1)
    cohorts = [draw_cohort(config.seed, round_, config.clients, config.fraction) for round_ in rounds]
    seeds = [
        [derive_seed(config.seed, "client", round_, client) for client in cohort]
        for round_, cohort in zip(rounds, cohorts, strict=True)
    ]
    indices = [torch.from_numpy(own).sort().values for own in parts.client_indices]
    return Federation(
        epochs=config.epochs,
        batch_size=config.data.batch_size,
        learning_rate=parts.model.configure_optimizers().defaults["lr"],
        unet={name: value for name, value in parts.model.unet.config.items() if not name.startswith("_")},
        workers=WORKERS,
        cohorts=cohorts,
        seeds=seeds,
        pixels=parts.dataset.train.pixels,
        alpha_bar=parts.model.schedule.alphas_cumprod,
        offsets=torch.tensor([0, *(len(own) for own in indices)]).cumsum(0),
        indices=torch.cat(indices),
        weights=parts.model.unet.state_dict(),
    )


def work_of(federation: Federation, participants: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Optimizer steps and images of rounds with these clients."""
    sizes = federation.offsets.diff()[torch.tensor([client for round_ in participants for client in round_])]
    steps = -(-sizes // federation.batch_size)
    return federation.epochs * int(steps.sum()), federation.epochs * int(sizes.sum())


def run_fedlight(federation: Federation, settings: Sequence[str]) -> Measurement:
    """Runs a cell as a user does. A round ends when its row is in `rounds.csv`, after the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tables: list[Path] = []
        ends: list[float] = []

        def note_rounds() -> None:
            if not tables:
                tables.extend(Path(folder).glob("runs/*/*/rounds.csv"))
            for table in tables:
                while table.read_bytes().count(b"\n") - 1 > len(ends):
                    ends.append(time.perf_counter())

        command = [sys.executable, "-m", "fedlight.run", *settings]
        done = run(command, folder, {**ENVIRONMENT, "WANDB_MODE": "offline"}, note_rounds)
        (cell,) = (path.parent for path in Path(folder).glob("runs/*/*/result.json"))
        rows = _read_table(cell / "rounds.csv")
        sent = [row for row in _read_table(cell / "ledger.csv") if row["direction"] == "up"]
        participants = [
            sorted({int(row["client"]) for row in sent if row["round"] == round_})
            for round_ in sorted({row["round"] for row in sent}, key=int)
        ]
        weights = load_file(cell / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    seconds = [float(rows[0]["seconds"]), *(end - begin for begin, end in pairwise(ends))]
    reported = {name: int(rows[-1][f"{name}_cumulative"]) for name in ("params", "bytes")}
    return _measurement(
        done, seconds, float(rows[-1]["train_loss"]), *work_of(federation, participants), weights, reported
    )


def run_worker(path: Path, python: Path, *command: str) -> Measurement:
    """Runs a worker script of another framework on the federation of a file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "weights.safetensors")
        done = run([str(python), *command, str(path), str(out)], folder, ENVIRONMENT)
        lines = [line for line in done.output.splitlines() if line.startswith('{"seconds"')]
        if len(lines) != 1:
            sys.exit(f"{' '.join(command)} printed no result\n{done.output[-4000:]}")
        printed = json.loads(lines[0])
        return _measurement(done, weights=load_file(out), **printed)


def _measurement(
    done: Run,
    seconds: list[float],
    loss: float,
    steps: int,
    images: int,
    weights: dict[str, Tensor],
    reported: dict[str, int] | None = None,
) -> Measurement:
    outside = done.seconds - sum(seconds)
    peaks = (done.peak_mb, done.peak_rss_mb)
    return Measurement(seconds, outside, *peaks, loss, steps, images, weights, reported or {})


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fusing() -> str | None:
    """Why `trainer.fuse` cannot be measured; None where it can."""
    try:
        composed("trainer.fuse=auto")
    except (BadInput, HydraException):
        return "this version has no key trainer.fuse"
    return None


def systems(
    federation: Federation, path: Path, settings: list[str]
) -> Iterator[tuple[str, Callable[[], Measurement] | str]]:
    """Each system and how to run it, or why it cannot be run."""

    def worker(environment: Environment, *command: str) -> Callable[[], Measurement] | str:
        try:
            return partial(run_worker, path, python_of(environment), *command)
        except Missing as reason:
            return str(reason)

    def cell(*overrides: str) -> Callable[[], Measurement]:
        return partial(run_fedlight, federation, [*settings, *overrides])

    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORKERS}")
    yield "bare loop", partial(run_worker, path, Path(sys.executable), script("bare_loop.py"))
    yield "fedlight, inline", cell("transport=inline")
    yield REFERENCE, cell("transport=processes")
    for transport in ("inline", "processes"):
        fused = cell(f"transport={transport}", "trainer.fuse=auto")
        yield f"fedlight, {transport}, fused", fusing() or fused
    yield "pfl-research", worker(PFL, script("run_pfl.py"))
    yield f"pfl-research, {WORKERS} processes", worker(PFL, *torchrun, script("run_pfl.py"))
    yield "BlazeFL, processes", worker(BLAZEFL, script("run_blazefl.py"), "processes")
    yield "BlazeFL, threads", worker(BLAZEFL, script("run_blazefl.py"), "threads")
    yield "Flower, simulation", worker(FLOWER, script("run_flower.py"))


def check_equal(
    measured: dict[str, Measurement], federation: Federation, reference_name: str = REFERENCE
) -> dict[str, float]:
    """Compares what the systems computed; ends the program with one line where it is not the same.

    Returns:
        For each system the greatest difference of a weight from that of the reference.
    """
    reference = measured[reference_name]
    expected = work_of(federation, federation.cohorts)
    differences = {}
    for name, result in measured.items():
        counted = (result.steps, result.images)
        if counted != expected:
            sys.exit(f"{name} took {counted} steps and images, not {expected}")
        if result.weights.keys() != reference.weights.keys():
            sys.exit(f"{name} has other parameters than {reference_name}")
        pairs = ((tensor, reference.weights[key]) for key, tensor in result.weights.items())
        differences[name] = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        if abs(result.loss - reference.loss) > LOSS_TOLERANCE * reference.loss:
            sys.exit(f"{name} has a loss of {result.loss}, {reference_name} of {reference.loss}")
        if not differences[name] <= WEIGHT_TOLERANCE:
            sys.exit(
                f"{name} has other weights than {reference_name}: they differ by up to {differences[name]}"
            )
    return differences


def compare(scenario: Scenario, rounds: int) -> tuple[dict[str, float], dict[str, object]]:
    """Runs a scenario on all systems in turn and prints its table; returns ratios and figures."""
    settings = scenario.settings(rounds)
    federation = make_federation(settings)
    measured: dict[str, Measurement] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "federation.safetensors")
        federations.write(federation, path)
        for name, act in systems(federation, path, settings):
            if isinstance(act, str):
                skipped[name] = act
                continue
            print(f"{scenario.title}: {name}", file=sys.stderr)
            measured[name] = act()
    differences = check_equal(measured, federation)
    ours, updates = measured[REFERENCE].round, len(federation.cohorts[0])
    rows = [
        [
            name,
            f"{run.round:.2f}",
            f"{1e3 * run.round / updates:.1f}",
            f"{run.round / ours:.2f}x",
            f"{run.seconds[0]:.2f}",
            f"{run.outside:.1f}",
            f"{run.peak_mb:.0f}",
            f"{run.loss:.5f}",
            f"{differences[name]:.0e}",
        ]
        for name, run in measured.items()
    ]
    columns = ["", "s a round", "ms an update", f"over {REFERENCE}", "first round, s", "start and end, s"]
    show(scenario.title, [*columns, "peak MB", "loss", "weights differ"], rows)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")
    figures = {
        name: {
            **{key: value for key, value in vars(run).items() if key != "weights"},
            "parameters": sum(tensor.numel() for tensor in run.weights.values()),
            "weight_difference": differences[name],
        }
        for name, run in measured.items()
    }
    ratios = {
        f"{scenario.title}: {name} over {REFERENCE}": run.round / ours
        for name, run in measured.items()
        if name != REFERENCE
    }
    return ratios, {"systems": figures, "skipped": skipped}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--setup", action="store_true", help="only make the frameworks' environments")
    given = arguments.parse_args()
    environments = (PFL, BLAZEFL, FLOWER)
    for environment in environments:
        try:
            print(f"{environment.requirement}: {python_of(environment)}", file=sys.stderr)
        except Missing as reason:
            print(f"{environment.requirement}: {reason}", file=sys.stderr)
    if given.setup:
        return
    ratios: dict[str, float] = {}
    figures: dict[str, object] = {}
    for scenario in SCENARIOS[:1] if given.quick else SCENARIOS:
        measured, figures[scenario.title] = compare(scenario, rounds=3 if given.quick else 4)
        ratios |= measured
    requirements = [environment.requirement for environment in environments]
    write(given.out, ratios, {"requirements": requirements, "scenarios": figures})


if __name__ == "__main__":
    main()
