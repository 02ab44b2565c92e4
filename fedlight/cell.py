"""One cell from configuration to result: build, federate, sample, write."""

import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, ModelMixin
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.fabric.utilities.warnings import disable_possible_user_warnings
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.data.client_data import ClientData
from fedlight.data.dataset import Dataset
from fedlight.data.partition import Indices, count_labels, pool
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.sampling import check_sampler, sample
from fedlight.federation.federator import Federator
from fedlight.federation.method import Method
from fedlight.federation.rounds import federate
from fedlight.federation.slices import SliceMap
from fedlight.federation.store import State, Store
from fedlight.runtime.errors import BadInput
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.machine import describe_machine
from fedlight.runtime.seeds import derive_seed
from fedlight.tracking import loggers, pictures
from fedlight.tracking.cell import SCHEMA, cell_id, masked, read_result, write_config, write_result
from fedlight.tracking.progress import ProgressBars
from fedlight.tracking.tables import LEDGER_COLUMNS, ROUND_COLUMNS, Table, write_partition

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
disable_possible_user_warnings()
warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")

LIBRARIES = ("fedlight", "torch", "lightning", "diffusers", "hydra-core", "numpy")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
FEW_CLIENTS = 20  # whose losses are logged one by one
GRID_CLIENTS, GRID_COLUMNS = 10, 16


@dataclass(frozen=True)
class Parts:
    """What a cell is built of, all of it checked before anything is written."""

    dataset: Dataset
    shares: list[Indices]
    module: DDPM
    slices: SliceMap
    method: Method
    make_trainer: Callable[..., Trainer]
    device: torch.device


def run_cell(config: DictConfig, settings: CellConfig) -> None:
    """Runs the cell that the composed configuration describes, or skips it where it is done.

    Args:
        config: as composed by Hydra from `configs/`.
        settings: the same, checked.

    Raises:
        BadInput: the cell cannot be run as asked; nothing was written.
        Diverged: a client's loss left the finite numbers; `result.json` says so.
    """
    plain = masked(OmegaConf.to_container(config, resolve=True))
    cell = cell_id(settings.model_dump(mode="json", by_alias=True))
    folder = Path(settings.output) / settings.name / cell
    if (read_result(folder) or {}).get("status") == "completed":
        print(f"{cell}: done already, in {folder}")
        return

    start = time.perf_counter()
    torch.set_num_threads(settings.trainer.threads or CORES)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    parts = build(config, settings)
    method = parts.method
    counts = count_labels(parts.dataset.train.labels, parts.shares, len(parts.dataset.classes))

    _make_folder(folder)
    write_config(folder / "config.yaml", plain)
    write_partition(folder / "partition.csv", counts, parts.dataset.classes)
    pictures.partition_heatmap(folder / "partition.png", counts, parts.dataset.classes, cell)
    rounds_csv = Table(folder / "rounds.csv", ROUND_COLUMNS)
    ledger_csv = Table(folder / "ledger.csv", LEDGER_COLUMNS)

    federator = Federator(method, parts.slices, parts.module, Store(folder / "checkpoint"))
    result = _blank_result(cell, settings, federator)
    seconds = result["seconds"]
    bars = ProgressBars(cell, settings.rounds)
    shares = [pool(parts.shares)] if method.pool else parts.shares
    logger = None
    try:
        logger = loggers.make_logger(config.logger, folder, settings.name, cell, plain)
        with bars:
            for done in federate(
                federator,
                parts.module,
                lambda client: ClientData(
                    parts.dataset.train.pixels, shares[client], settings.data.batch_size
                ),
                partial(parts.make_trainer, callbacks=[federator, bars]),
                rounds=settings.rounds,
                clients=settings.clients,
                fraction=settings.fraction,
                dropout=settings.federation.dropout,
                seed=settings.seed,
                on_tasks=lambda tasks: bars.start_round(sum(not task.drops_out for task in tasks)),
            ):
                result["exchange"] = exchange = federator.ledger.totals(federator.model_params)
                if done.train_loss is not None:
                    result["train_loss"] = done.train_loss
                seconds["training"] += done.training
                seconds["merging"] += done.merging
                row = {
                    "round": done.round,
                    "train_loss": done.train_loss,
                    "params_down": sum(e.params for e in done.exchange if e.direction == "down"),
                    "params_up": sum(e.params for e in done.exchange if e.direction == "up"),
                    "params_cumulative": exchange["params_total"],
                    "bytes_cumulative": exchange["bytes_total"],
                    "participants": done.participants,
                    "reports": len(done.client_losses),
                    "fid": None,
                    "seconds": round(done.training + done.merging, 3),
                }
                rounds_csv.append([row])
                ledger_csv.append(asdict(entry) for entry in done.exchange)
                loggers.log_round(logger, row, done.client_losses if settings.clients <= FEW_CLIENTS else {})
                bars.end_round(done.train_loss)

            sampling = time.perf_counter()
            grid = _sample_grid(folder, federator, parts, settings, bars)
            seconds["evaluation"] = time.perf_counter() - sampling
        _save_model(folder / "model", federator, parts.module)
        result["state_sha256"] = state_sha256(federator.state)
        if method.evaluate == "clients":
            result["client_sha256"] = [
                state_sha256(federator.client_state(client)) for client in range(settings.clients)
            ]
        loggers.log_pictures(logger, settings.rounds, partition=folder / "partition.png", samples=grid)
        result["status"] = "completed"
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        result["status"] = "interrupted" if interrupted else "failed"
        result["error"] = "interrupted" if interrupted else str(error) or type(error).__name__
        raise
    finally:
        seconds["total"] = time.perf_counter() - start
        result["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        loggers.finish(logger, result)
        write_result(folder, result)
    loss = "" if result["train_loss"] is None else f"loss {result['train_loss']:.4f}, "
    exchanged = result["exchange"]["params_total"]
    print(f"{cell}: {loss}{exchanged:,} parameters exchanged, {seconds['total']:.0f} s, in {folder}")


def build(config: DictConfig, settings: CellConfig) -> Parts:
    """Loads the data, deals it to the clients, and makes model, slice map and Trainer.

    Raises:
        BadInput: some part cannot be made as asked, or the parts do not fit each other.
    """
    try:
        dataset: Dataset = instantiate(config.data.source)
    except OSError as error:
        raise BadInput(f"data: {error}") from error
    dataset = Dataset(dataset.train.first(settings.data.limit), dataset.test, dataset.classes)
    shape = (settings.data.channels, settings.data.image_size, settings.data.image_size)
    if tuple(dataset.train.pixels.shape[1:]) != shape:
        raise BadInput(
            f"data.channels and data.image_size say {shape}, but {settings.data.name} holds images of "
            f"{tuple(dataset.train.pixels.shape[1:])} (channels, height, width)"
        )
    deal = instantiate(config.partition.deal, _partial_=True)
    try:
        shares = deal(dataset.train.labels, settings.clients)
    except TypeError as error:
        raise BadInput(f"partition: {error}") from error

    seed_everything(derive_seed(settings.seed, "model"), verbose=False)
    schedule = instantiate(config.model.schedule)
    check_sampler(settings.evaluation.sampler, settings.evaluation.steps, schedule)
    unet = instantiate(config.model.unet, _convert_="all")
    if not isinstance(unet, ModelMixin):
        raise BadInput(f"model.unet must be a diffusers model (ModelMixin), got {type(unet).__name__}")
    module = DDPM(
        unet,
        schedule,
        loss=settings.model.loss,
        optimizer=instantiate(config.optimizer, _partial_=True),
        slices=settings.model.slices,
        ema_decay=settings.model.ema_decay,
        exchange_ema=settings.model.exchange_ema,
    )
    slices = SliceMap.build(module.slices, module.state_dict(), module.private)
    method = settings.method.resolve(slices.names)
    make_trainer = _trainer_factory(settings)
    try:
        device = make_trainer().strategy.root_device
        module.configure_optimizers()
        with torch.no_grad():
            predicted = module.unet(torch.zeros(1, *shape), 0).sample
    except Exception as error:  # each library has errors of its own
        raise BadInput(f"model, optimizer or trainer: {error}") from error
    if predicted.shape != (1, *shape):
        raise BadInput(f"model.unet predicts {tuple(predicted.shape[1:])} for images of {shape}")
    return Parts(dataset, shares, module, slices, method, make_trainer, device)


def _trainer_factory(settings: CellConfig) -> Callable[..., Trainer]:
    """Makes the Trainer of one local update; what the federation decides is not the user's to set."""
    asked = settings.trainer.model_dump(exclude={"threads"})
    decided: dict[str, Any] = {
        "max_epochs": settings.epochs,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [LightningEnvironment()],  # a client's Trainer joins no SLURM world
    }
    if taken := asked.keys() & (decided.keys() | {"callbacks"}):
        raise BadInput(f"trainer.{min(taken)} cannot be set: the federation decides it")
    fused = (settings.optimizer.model_extra or {}).get("fused")
    if fused and asked.get("gradient_clip_val") and settings.trainer.precision != "32-true":
        raise BadInput(
            "trainer.gradient_clip_val in mixed precision needs an optimizer that is not fused: add "
            "optimizer.fused=false"
        )
    return partial(Trainer, **asked, **decided)


def _make_folder(folder: Path) -> None:
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"output: cannot write to {folder}: {error.strerror}") from error


def _blank_result(cell: str, settings: CellConfig, federator: Federator) -> dict[str, Any]:
    """`result.json` before the first round."""
    return {
        "schema": SCHEMA,
        "status": "failed",
        "cell": cell,
        "name": settings.name,
        "method": settings.method.name,
        "clients": settings.clients,
        "rounds": settings.rounds,
        "epochs": settings.epochs,
        "fraction": settings.fraction,
        "seed": settings.seed,
        "data": settings.data.name,
        "partition": settings.partition.name,
        "model": settings.model.name,
        "model_params": federator.model_params,
        "slices": federator.slice_params(),
        "exchange": federator.ledger.totals(federator.model_params),
        "train_loss": None,
        "fid": None,
        "state_sha256": None,
        "client_sha256": [],
        "seconds": dict.fromkeys(("total", "training", "merging", "evaluation", "checkpoint"), 0.0),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "machine": describe_machine(),
        "error": None,
    }


def _sample_grid(
    folder: Path, federator: Federator, parts: Parts, settings: CellConfig, bars: ProgressBars
) -> Path | None:
    """Draws the sample grid of the global model, or a row for each of the first clients."""
    if not settings.evaluation.grid:
        return None
    module, size = parts.module.to(parts.device), settings.data.image_size
    states: Iterable[tuple[str, State]]
    if federator.method.evaluate == "clients":
        clients = range(min(settings.clients, GRID_CLIENTS))
        states = ((f"client {client}", federator.client_state(client)) for client in clients)
        models, images = len(clients), min(settings.evaluation.grid, GRID_COLUMNS)
    else:
        states = [("", federator.global_state())]
        models, images = 1, settings.evaluation.grid
    on_step = bars.sampling(models * settings.evaluation.steps)
    rows: list[Tensor] = []
    labels: list[str] = []
    for client, (label, state) in enumerate(states):
        module.load_state_dict(state)
        drawn = sample(
            module.denoiser,
            module.schedule,
            (images, settings.data.channels, size, size),
            sampler=settings.evaluation.sampler,
            steps=settings.evaluation.steps,
            seed=derive_seed(settings.seed, "sample", settings.rounds, client),
            batch_size=images,
            on_step=on_step,
        )
        chunks = drawn.split(GRID_COLUMNS)
        rows += chunks
        labels += [label] * len(chunks)
    module.cpu()
    path = folder / "samples" / f"round_{settings.rounds:03d}.png"
    title = f"{settings.method.name}, {settings.clients} clients, after round {settings.rounds}"
    pictures.sample_grid(path, rows, labels, title)
    return path


def _save_model(folder: Path, federator: Federator, module: DDPM) -> None:
    """Saves the federated model in the layout of diffusers' `from_pretrained`."""
    module.load_state_dict(federator.global_state())
    unet = module.denoiser.to(memory_format=torch.contiguous_format)
    DDPMPipeline(unet, module.schedule).save_pretrained(folder)
