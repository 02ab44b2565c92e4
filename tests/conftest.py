"""Fixtures: cells made through the command line, in this process, a cache, extractors, real Fashion-MNIST."""

import csv
import gc
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: small tensors, busy machines
os.environ.setdefault("FEDLIGHT_WORKERS", "1")  # the tests of helpers ask for them
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before flwr is loaded, as what it starts has it

import forkserver
import torch
from diffusers import DDPMPipeline
from hydra._internal.hydra import Hydra
from hydra.utils import instantiate
from joblib.externals.loky import reusable_executor
from omegaconf import OmegaConf
from pretrained import save_pretrained
from torch import Tensor
from torch.optim import Adam

from fedlight import run
from fedlight.data import digits
from fedlight.data.dataset import Dataset
from fedlight.data.fmnist import DEBIAN
from fedlight.diffusion.ddpm import DDPM
from fedlight.evaluation.extractor import Extractor, make_classifier
from fedlight.experiment.finished import open_cell
from fedlight.federation.messages import Broadcast, Update, from_bytes, to_bytes
from fedlight.federation.server import Server
from fedlight.federation.slices import SliceMap

SLICE_PREFIXES = {
    "encoder": ("init_conv", "time_mlp", "downs"),
    "bottleneck": ("mid",),
    "decoder": ("ups", "head"),
}

LONGEST = (
    "slurm",
    "flower_faults",
    "restart",
    "audit",
    "flower",
    "hostile_messages",
    "make_gpu",
    "sweeps",
    "report",
    "report_damage",
    "evaluation",
    "received_plan",
    "exchange",
    "report_page",
    "environment",
    "sweep_grammar",
    "conditional",
    "trust",
    "processes",
    "many_clients",
    "dask",
)

SMALL = ["logger=none", "data.limit=120", "rounds=2", "epochs=1", "evaluation.steps=2", "evaluation.grid=0"]
SMALL += ["evaluation.samples=0"]


@dataclass(frozen=True)
class Cell:
    """A finished cell, read back from its files."""

    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def digest(self) -> tuple[Any, ...]:
        """Hashes of the weights, and what was exchanged."""
        return self.result["state_sha256"], tuple(self.result["client_sha256"]), self.result["exchange"]

    def rows(self, table: str) -> list[dict[str, str]]:
        with (self.folder / table).open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def sizes(self) -> list[int]:
        """Images of each client."""
        sizes: Counter[int] = Counter()
        for row in self.rows("partition.csv"):
            sizes[int(row["client"])] += int(row["count"])
        return [sizes[client] for client in range(len(sizes))]

    @property
    def model(self) -> dict[str, Tensor]:
        """The global UNet's tensors, as `from_pretrained` reads them where it is what was trained."""
        if (self.folder / "model").is_dir():
            return DDPMPipeline.from_pretrained(self.folder / "model").unet.state_dict()
        state = open_cell(self.folder, trust=True).server.global_state()
        return {name.removeprefix("unet."): tensor for name, tensor in state.items() if name[:5] == "unet."}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that names a tiny pretrained pipeline."""
    folder = save_pretrained(tmp_path_factory.mktemp("pretrained") / "model")
    return f"finetuning.pretrained={folder}"


def configured(path: Path, image_size: int, channels: int = 1) -> tuple[DDPM, SliceMap]:
    """The model of a file of configs/model and its slice map."""
    data = {"image_size": image_size, "channels": channels}
    config = OmegaConf.create({"data": data, "model": OmegaConf.load(path)}).model
    model = DDPM(
        unet=instantiate(config.unet),
        schedule=instantiate(config.schedule),
        loss=config.loss,
        optimizer=partial(Adam, lr=1e-4),
        slices=OmegaConf.to_container(config.slices),
        ema_decay=config.ema_decay,
        exchange_ema=config.exchange_ema,
    )
    return model, SliceMap.build(model.slices, model.state_dict(), model.private)


def slow(*values: Any) -> list[Any]:
    """Values of a test's parameter that `make check` leaves out."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def invoke(*arguments: str, main: Callable[[], None] = run.main) -> int:
    """Runs `python -m fedlight.run ARGUMENTS`, or another `main`, in this process; returns its status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedlight", *arguments])
        if "--config-dir" not in arguments:  # Hydra composes twice, to find a hydra.mode, which only they set
            patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def workers_of(pid: int) -> list[int]:
    """The processes that a cell has started to train clients, the last one first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and "LokyProcess" in (path / "cmdline").read_text():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def classifier_of(name: str, data: Dataset, cache: Path) -> Extractor:
    """The classifier of a data set, from the cache or trained now."""
    train, test = ((split.pixels, torch.from_numpy(split.labels)) for split in (data.train, data.test))
    return make_classifier(name, train, test, len(data.classes), str(cache), torch.device("cpu"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of these tests and of what they start, empty at first; the user's own is left alone.

    Workers of pytest-xdist share the classifiers, each of which takes seconds to train.
    """
    folder = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = tmp_path_factory.getbasetemp().parent / "classifier"
        shared.mkdir(exist_ok=True)
        (folder / "classifier").symlink_to(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLIGHT_CACHE", str(folder))
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        for extractor in ("INCEPTION", "DINOV2", "CLIP"):
            patch.delenv(f"FEDLIGHT_{extractor}", raising=False)
        yield folder


@pytest.fixture(scope="module", autouse=True)
def no_process_of_joblib_is_left() -> Iterator[None]:
    """Joblib keeps its processes for later calls; in the next module they would pass for a cell's workers."""
    yield
    if (kept := reusable_executor._executor) is not None:
        kept.shutdown(wait=True, kill_workers=True)


@pytest.fixture(scope="session")
def digits_classifier(cache: Path) -> Extractor:
    """Trained once a session, for cells too."""
    return classifier_of("digits", digits.load(), cache)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `python -m fedlight.run ARGUMENTS` in `tmp_path`; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    return invoke


@pytest.fixture
def cell(command: Callable[..., int], tmp_path: Path) -> Callable[..., Cell]:
    """Runs a small cell, which must succeed, under a sweep name of its own and returns it."""
    count = 0

    def call(*arguments: str) -> Cell:
        nonlocal count
        count += 1
        assert command(*SMALL, f"name=cell{count}", *arguments) == 0
        (path,) = tmp_path.glob(f"runs/cell{count}/*/result.json")
        return Cell(path.parent)

    return call


@pytest.fixture(scope="session")
def finished_cells() -> dict[tuple[str, ...], Path]:
    """The folders of cells that `finished` copies."""
    return {}


@pytest.fixture
def finished(
    finished_cells: dict[tuple[str, ...], Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Cell]:
    """A copy of a small cell, for tests of what is done with one; each is run once a session."""
    monkeypatch.chdir(tmp_path)

    def copy(*arguments: str) -> Cell:
        if arguments not in finished_cells:
            folder = tmp_path_factory.mktemp("finished")
            assert invoke(*SMALL, "name=finished", f"output={folder}", *arguments) == 0
            (finished_cells[arguments],) = folder.glob("finished/*/")
        original = finished_cells[arguments]
        return Cell(shutil.copytree(original, Path("runs", "finished", original.name).absolute()))

    return copy


@dataclass
class Wire:
    """The messages that crossed, in order."""

    broadcasts: list[Broadcast]
    updates: list[Update]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Records every message that the server sends and receives."""
    found = Wire([], [])
    start_round, receive = Server.start_round, Server.receive

    def recorded(server: Server) -> list[Broadcast]:
        broadcasts = [from_bytes(to_bytes(broadcast)) for broadcast in start_round(server)]
        found.broadcasts += broadcasts
        return broadcasts

    def record(server: Server, update: Update) -> None:
        found.updates.append(from_bytes(to_bytes(update)))
        receive(server, update)

    monkeypatch.setattr(Server, "start_round", recorded)
    monkeypatch.setattr(Server, "receive", record)
    return found


@pytest.fixture(scope="session")
def fmnist() -> None:
    """Real Fashion-MNIST, from the Debian package dataset-fashion-mnist."""
    if not DEBIAN.is_dir():
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")


def pytest_configure(config: pytest.Config) -> None:
    """Starts the fork server for all processes of pytest-xdist, where those run.

    Lets the suite's processes hear an interrupt, which one of a shell's jobs in the background ignores.
    """
    if config.getoption("numprocesses", default=None) and not hasattr(config, "workerinput"):
        os.environ[forkserver.SHARED] = str(forkserver.start_server())
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that no worker is left with one, and leaves out what needs a GPU.

    Tests marked `gpu` run where there is one, and with `-m gpu`.
    """
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))
    if config.option.markexpr == "gpu" or torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Exempts what is loaded from garbage collection, which otherwise visits all of it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a test that the whole run skips is a failure: what CI is meant to run must have run."""
    gc.unfreeze()  # libraries complain at the end of a process of what was not collected
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    whole = not session.config.option.markexpr
    if os.environ.get("CI") and whole and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
