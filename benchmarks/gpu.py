"""Tests, measurements and the paper's grid on a machine with a GPU, in slices.

python benchmarks/gpu.py [--slice SECONDS] [--out runs/gpu]

The work is a list of units. Each writes a JSON file to OUT/DEVICE/results; a unit that has its file is not
done again, and cells continue from their checkpoints. So the same command continues where the last one was
stopped, by its slice or by a signal. A unit that failed is a row with the error; remove its file to try it
again. The tables are rewritten at the end of each slice, those of a GPU to docs/gpu.md, too. Without a GPU
everything is small, and only shows that the code works.

Exit status: 0 all is done, 1 a unit failed, 75 there is more to do.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MORE = 75  # exit status: EX_TEMPFAIL of sysexits.h
METHODS = "FULL,UDEC,ULATDEC,USPLIT"
MPS = "nvidia-cuda-mps-control"
MPS_FOLDER = Path(tempfile.gettempdir(), f"fedlight-mps-{os.getuid()}")
STEPS = {
    "plain fp32": "plain",
    "fp32": "eager",
    "bf16": "eager",
    "compiled fp32": "compiled",
    "compiled bf16": "compiled",
    "CUDA graphs fp32": "graphs",
    "CUDA graphs bf16": "graphs",
}
SAMPLING = {"fp32": "eager", "bf16": "eager", "compiled fp32": "compiled"}
FUSED = {"fused clients": False, "fused clients, CUDA graphs": True}
FASTER = 1.1  # of the compiled step over the eager one, from which on the grid's cells are compiled

Found = dict[str, Any]  # what a unit measured: `rows`, and what else the tables need


@dataclass(frozen=True)
class Size:
    """The sizes of the measurements.

    Attributes:
        device: cuda or cpu.
        network: overrides that choose model and data of the measurements.
        batch: images a step.
        repeats: of a step.
        at_once: numbers of processes that train at once on the device.
        fused: numbers of small clients that train in one computation.
        small: overrides that choose model and data of these clients, and their images a step.
        images: drawn in a measurement of sampling.
        grid: overrides of each part of the grid, in the sequence of what it teaches.
        cells: overrides of all its cells.
    """

    device: str
    network: tuple[str, ...]
    batch: int
    repeats: int
    at_once: tuple[int, ...]
    fused: tuple[int, ...]
    small: tuple[tuple[str, ...], int]
    images: int
    grid: tuple[str, ...]
    cells: tuple[str, ...]


FULL_SIZE = Size(
    device="cuda",
    network=("experiment=paper",),
    batch=128,
    repeats=30,
    at_once=(1, 2, 4, 8),
    fused=(1, 10, 32, 100),
    small=(("data=digits", "model=tiny"), 16),
    images=2048,
    grid=(
        "sweeps=paper_iid clients=5",
        "sweeps=paper_iid clients=2,10",
        "sweeps=paper_skew clients=5",
        "sweeps=paper_skew clients=2,10",
    ),
    cells=("trainer.precision=auto", "evaluation.samples=5000"),
)
TINY = ("data=digits", "model=tiny", "model.unet.dim=4", "model.unet.dim_mults=[1]", "trainer.threads=1")
SMALL_SIZE = Size(
    device="cpu",
    network=TINY,
    batch=16,
    repeats=2,
    at_once=(1, 2),
    fused=(1, 3),
    small=(TINY, 2),
    images=16,
    grid=(
        "sweeps=paper_iid clients=2",
        "sweeps=paper_skew clients=2 partition=label_skew",
    ),
    cells=(
        *(*TINY, "data.limit=200", "data.batch_size=32", "rounds=2", "epochs=1", "evaluation.samples=80"),
        *("evaluation.steps=2", "evaluation.grid=0"),
    ),
)


@dataclass(frozen=True)
class Unit:
    """A part of the work that is done at once or, as a part of the grid, continues from its checkpoints."""

    name: str
    act: Callable[[], Found]


def units_of(folder: Path, size: Size) -> list[Unit]:
    """All units, in order."""
    mps = [(n, with_mps) for with_mps in (False, True) for n in size.at_once]
    return [
        Unit("tests", partial(run_tests, folder)),
        Unit("limits", partial(measure_limits, size)),
        *(Unit(f"step {name}", partial(measure_step, size, name)) for name in STEPS),
        *(
            Unit(f"at once {n}{' MPS' if with_mps else ''}", partial(measure_at_once, size, n, with_mps))
            for n, with_mps in mps
        ),
        *(Unit(f"{name} {n}", partial(measure_fused, size, name, n)) for name in FUSED for n in size.fused),
        *(Unit(f"sampling {name}", partial(measure_sampling, size, name)) for name in SAMPLING),
        *(Unit(f"grid {asked}", partial(run_cells, folder, size, asked)) for asked in size.grid),
        Unit("inception", partial(score_by_inception, folder)),
    ]


def result_path(folder: Path, name: str) -> Path:
    return folder / "results" / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}.json"


def undone(folder: Path, size: Size) -> list[Unit]:
    """The units without a file, in order."""
    return [unit for unit in units_of(folder, size) if not result_path(folder, unit.name).exists()]


def keep(folder: Path, name: str, found: Found) -> None:
    from common import write

    from fedlight.runtime.files import atomic

    path = result_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        write(temporary, {}, found)


def missing(reason: str) -> Found:
    return {"rows": [{"not available": reason}]}


# The units


class Recorder:
    """A pytest plugin that stores the outcome of each test, and skips tests with a stored outcome."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if not result_path(self._folder, item.name).exists()]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            name = report.nodeid.partition("::")[2]
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = f": {' '.join(crash.message.split())[:200]}" if crash else ""
            row = {"test": name, "result": f"{report.outcome}{reason}", "seconds": report.duration}
            keep(self._folder, name, {"rows": [row]})


def run_tests(folder: Path) -> Found:
    """Runs the tests marked `gpu` on the available device, in a process that receives no signals."""
    tests = multiprocessing.get_context("spawn").Process(target=_run_pytest, args=(folder,))
    tests.start()
    tests.join()
    if tests.exitcode not in (0, 1, 5):  # passed, failed, none left
        raise RuntimeError(f"pytest ended with status {tests.exitcode}")
    kept = sorted((folder / "results").glob("test-*.json"), key=lambda path: path.stat().st_mtime)
    return {"rows": [row for path in kept for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]}


def _run_pytest(folder: Path) -> None:
    import pytest

    tests = HERE.parent / "tests" / "integration" / "test_gpu.py"
    sys.exit(pytest.main(["-q", "-m", "gpu", str(tests)], [Recorder(folder)]))


def measure_limits(size: Size) -> Found:
    """Speeds of a matrix product and of a copy; operations and bytes of a step and of a forward pass."""
    import step as training
    import torch

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    speeds, costs = {}, {}
    for name, dtype in kinds.items():
        speeds[name], copy = training.machine_speed(dtype, size.device)
    if size.device == "cuda":  # as convolutions multiply there by default, and so the limit of a step in fp32
        torch.set_float32_matmul_precision("high")
        speeds["TF32"], copy = training.machine_speed(torch.float32, size.device)
        torch.set_float32_matmul_precision("highest")
    for name, dtype in kinds.items():
        training.begin(dtype, "eager", size.batch, size.device, size.network)
        training.run()
        operations, traffic = training.cost()
        autocast = torch.autocast(size.device, torch.bfloat16, enabled=name == "bf16")
        with torch.no_grad(), autocast, training.Traffic() as forward:
            training.forward()
        costs[name] = {"step": [operations, traffic], "forward": [operations / 3, forward.bytes]}
    rows: list[dict[str, Any]] = [
        {"limit": f"matrix product, {name}", "TFLOP/s": speed / 1e12} for name, speed in speeds.items()
    ]
    rows.append({"limit": "copy", "GB/s": copy / 1e9})
    return {"rows": rows, "speeds": speeds, "copy": copy, "costs": costs, "batch": size.batch}


def measure_step(size: Size, name: str) -> Found:
    """Median seconds of a step; loss of the first step, and its seconds, compilation included."""
    import step as training
    import torch
    from common import in_turns

    torch._dynamo.reset()
    begun = time.perf_counter()
    training.begin(_dtype(name), STEPS[name], size.batch, size.device, size.network)
    loss, first = training.run(), time.perf_counter() - begun
    for _ in range(min(3, size.repeats)):  # CUDA graphs are recorded in the first ones
        training.run()
    seconds = in_turns({name: training.run}, size.repeats, size.device)[name]
    row = {"step": name, "seconds": seconds, "first": first, "loss": loss}
    return {"rows": [row | {"images/s": size.batch / seconds}]}


def _dtype(name: str) -> Any:
    import torch

    return torch.bfloat16 if name.endswith("bf16") else torch.float32


def measure_at_once(size: Size, processes: int, with_mps: bool) -> Found:
    """Images a second of processes that train in parallel on the device, each its own model, in bf16."""
    from concurrent.futures import ProcessPoolExecutor, wait

    import step as training

    if with_mps and not (size.device == "cuda" and shutil.which(MPS)):
        return missing(f"{MPS} is not installed" if size.device == "cuda" else "no GPU")
    context = multiprocessing.get_context("spawn")
    given = (_dtype("bf16"), "eager", size.batch, size.device, size.network)
    with ExitStack() as stack:
        if with_mps:
            stack.enter_context(mps())
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, context, training.begin, given))
            for _ in range(processes)
        ]
        for warm in [pool.submit(training.run) for _ in range(3) for pool in pools]:
            warm.result()
        begun = time.perf_counter()
        steps = [pool.submit(training.run) for _ in range(size.repeats) for pool in pools]
        wait(steps)
        seconds = time.perf_counter() - begun
        losses = {step.result() for step in steps[-processes:]}
        if with_mps and not _mps("get_server_list").strip():
            raise RuntimeError("the processes did not use MPS")
    if len(losses) > 1:
        print(f"the processes came to other losses: {sorted(losses)}", file=sys.stderr)
    images = processes * size.repeats * size.batch
    return {"rows": [{"processes": processes, "MPS": with_mps, "images/s": images / seconds}]}


def measure_fused(size: Size, name: str, clients: int) -> Found:
    """Median seconds of a step of small clients in one computation, and its loss."""
    from common import in_turns
    from fused_step import FusedStep

    network, images = size.small
    step = FusedStep(clients, images, size.device, network, FUSED[name])
    loss = step().mean().item()
    seconds = in_turns({name: step}, size.repeats, size.device)[name]
    row = {"fused": name, "clients": clients, "images": images, "seconds": seconds, "loss": loss}
    return {"rows": [row | {"clients/s": clients / seconds}]}


@contextmanager
def mps() -> Iterator[None]:
    """Provides CUDA's Multi-Process Service to the processes that are started in the body."""
    MPS_FOLDER.mkdir(exist_ok=True)
    names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
    os.environ.update(dict.fromkeys(names, str(MPS_FOLDER)))
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        quiet = subprocess.DEVNULL  # the daemon would keep a pipe open
        subprocess.run([MPS, "-d"], check=True, timeout=60, stdin=quiet, stdout=quiet, stderr=quiet)
        yield
    finally:
        quit_mps()
        for name in names:
            os.environ.pop(name, None)
        signal.signal(signal.SIGTERM, before)


def _mps(command: str) -> str:
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(MPS_FOLDER)}
    done = subprocess.run(
        [MPS],
        input=f"{command}\n",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        encoding="utf-8",
        errors="replace",
    )
    return done.stdout


def quit_mps() -> None:
    """Ends the daemon of `mps`, if there is one."""
    if MPS_FOLDER.is_dir():
        with suppress(OSError, subprocess.SubprocessError):
            _mps("quit -t 10")
        shutil.rmtree(MPS_FOLDER, ignore_errors=True)


def measure_sampling(size: Size, name: str) -> Found:
    """Images a second of the cells' sampler, from an untrained model."""
    import torch
    from common import composed, in_turns
    from step import compile_unet

    from fedlight.data.class_names import DIGITS
    from fedlight.diffusion.sampling import sample
    from fedlight.experiment.setup import make_client_model

    torch._dynamo.reset()
    _, config = composed(*size.network)
    torch.manual_seed(0)
    module = make_client_model(config, DIGITS).module.to(size.device)
    if SAMPLING[name] == "compiled":
        compile_unet(module.unet, "compiled", size.device)
    asked = config.evaluation

    def draw() -> None:
        with torch.autocast(size.device, torch.bfloat16, enabled=name == "bf16"):
            sample(
                module.denoiser,
                module.schedule,
                (size.images, *config.data.shape),
                sampler=asked.sampler,
                steps=asked.steps,
                seed=0,
            )

    seconds = in_turns({name: draw}, min(3, size.repeats), size.device)[name]
    row = {"sampling": name, "sampler": asked.sampler, "steps": asked.steps, "seconds": seconds}
    return {"rows": [row | {"images/s": size.images / seconds}]}


def run_cells(folder: Path, size: Size, asked: str) -> Found:
    """Runs a part of the grid by `fedlight.run -m`; cells that are done are skipped, others continue."""
    from fedlight.hydra_command import run_hydra_command
    from fedlight.run import check_and_run

    speed = chosen(folder) if size.device == "cuda" else []
    command = [*asked.split(), f"method={METHODS}", "logger=none", f"output={folder}", *size.cells, *speed]
    print("python -m fedlight.run -m", *command, flush=True)
    sys.argv = ["fedlight.run", "-m", *command]
    status = run_hydra_command(check_and_run)
    if status > 128:  # ended by a signal: not done
        sys.exit(status)
    if status:
        raise RuntimeError(f"fedlight.run ended with {status}; the table of cells says which of them failed")
    return {"rows": [], "settings": command}


def chosen(folder: Path) -> list[str]:
    """The overrides that were measured to be fastest on this device."""
    from gpu_tables import rows

    seconds = {row["step"]: row["seconds"] for name in STEPS for row in rows(folder, f"step {name}", "step")}
    speeds = {
        row["processes"]: row["images/s"]
        for n in FULL_SIZE.at_once
        for row in rows(folder, f"at once {n}", "processes")
    }
    compiled = seconds.get("compiled bf16", float("inf")) * FASTER < seconds.get("bf16", 0)
    workers = max(speeds, key=lambda n: speeds[n], default=1)
    return [f"trainer.compile={str(compiled).lower()}", f"trainer.workers={workers}"]


def score_by_inception(folder: Path) -> Found:
    """FID by Inception of every finished cell, of images sampled again with the cell's seeds."""
    from gpu_tables import done_cells

    from fedlight.data.loading import load
    from fedlight.evaluation.extractor import make_pretrained
    from fedlight.evaluation.reference import make_reference
    from fedlight.evaluation.weights import present_weights
    from fedlight.experiment.finished import DEVICE, open_cell

    cells = done_cells(folder)
    if not cells:
        return missing("no cell is done")
    config = open_cell(cells[0]).config  # data and cache are the same in all cells
    weights = present_weights("inception", config.evaluation.weights, config.evaluation.cache)
    if weights is None:
        return missing("no weights are here: python -m fedlight.prepare evaluation.extractor=inception")
    extractor = make_pretrained("inception", weights, DEVICE)
    reference = make_reference(load(config.data).test.pixels, extractor, config.evaluation.cache)
    for cell in cells:
        if not result_path(folder, f"inception {cell.name}").exists():
            keep(folder, f"inception {cell.name}", {"rows": [_inception(cell, extractor, reference)]})
    return {"rows": []}


def _inception(folder: Path, extractor: Any, reference: Any) -> dict[str, Any]:
    from fedlight.evaluation.scores import score
    from fedlight.experiment.finished import open_cell
    from fedlight.runs.identity import read_result
    from fedlight.runtime.seeds import derive_seed

    cell, result = open_cell(folder), read_result(folder)
    assert result is not None
    fids = []
    for client in result["fid"]["clients"] or [None]:
        seed = derive_seed(cell.config.seed, "sample", cell.config.rounds, client or 0)
        images = cell.draw(client, cell.config.evaluation.samples, seed)
        fids.append(score(extractor(images), reference)["fid"])
    return {"cell": folder.name, "fid": sum(fids) / len(fids), "extractor_sha256": extractor.sha256}


# A slice


def work(folder: Path, size: Size) -> None:
    """Does the remaining units in this process."""
    for unit in undone(folder, size):
        print(f"\n{unit.name}", flush=True)
        begun = time.perf_counter()
        try:
            found = unit.act()
        except Exception as error:  # of a compiler, a driver, memory, ...: a row tells it
            traceback.print_exc()
            keep(folder, unit.name, missing(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
            sys.exit(1)  # it may have left the device in a bad state: a fresh process does the rest
        keep(folder, unit.name, found | {"seconds": time.perf_counter() - begun})


def work_until(end: float | None, grace: float, folder: Path, size: Size) -> bool:
    """Runs processes until all units are done or the time `end`; returns whether all are done.

    A process is asked to end by SIGTERM, and after `grace` seconds killed, with all that it started.
    """
    while todo := [unit.name for unit in undone(folder, size)]:
        command = [sys.executable, __file__, "--worker", "--out", str(folder)]
        worker = subprocess.Popen(command, start_new_session=True)
        try:
            worker.wait(None if end is None else max(0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            worker.terminate()
            with suppress(subprocess.TimeoutExpired):
                worker.wait(grace)
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            quit_mps()
        if worker.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return False
        if not result_path(folder, todo[0]).exists():
            keep(folder, todo[0], missing(f"its process ended with status {worker.returncode}"))
    return True


def interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    begun = time.monotonic()
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--slice", type=float, help="seconds after which to stop; default: when all is done"
    )
    arguments.add_argument("--out", type=Path, default=Path("runs/gpu"), help="default: %(default)s")
    arguments.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    size = FULL_SIZE if device else SMALL_SIZE
    if given.worker:
        work(given.out, size)
        return

    folder = given.out.resolve() / re.sub(r"\W+", "-", device or "cpu").lower()
    if not device:
        os.environ |= {"OMP_NUM_THREADS": "1", "FEDLIGHT_WORKERS": "1"}
        print("No GPU here: everything is small, shows that it works, and says nothing of a GPU.", flush=True)
    signal.signal(signal.SIGTERM, interrupt)
    grace = min(20.0, given.slice / 12) if given.slice else 20.0
    done = work_until(given.slice and begun + given.slice - 2 * grace, grace, folder, size)

    from gpu_tables import write_tables

    failures = write_tables(folder, device, [unit.name for unit in units_of(folder, size)])
    said = (
        "all is done"
        if done
        else f"{len(undone(folder, size))} units are left; the same command goes on from here"
    )
    print(f"gpu: {said}; {failures} failed; tables: {folder / 'tables.md'}")
    sys.exit(MORE if not done else bool(failures))


if __name__ == "__main__":
    main()
