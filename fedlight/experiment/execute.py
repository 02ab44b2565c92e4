"""One cell from configuration to result: build, federate, score, write."""

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from fedlight.config import CellConfig
from fedlight.data.partition import count_labels
from fedlight.diffusion.ddpm import DDPM
from fedlight.experiment.build import Parts, build, precision, worker_count
from fedlight.experiment.evaluate import grid_path, is_due, score_models
from fedlight.federation.cohort import Federation, Task
from fedlight.federation.federator import Federator
from fedlight.federation.ledger import Entry
from fedlight.federation.rounds import Round, federate, replay
from fedlight.federation.store import Saved, Store
from fedlight.loggers import pictures
from fedlight.loggers.metrics import CellLog
from fedlight.loggers.progress import ProgressBars
from fedlight.runs.csv_files import write_partition
from fedlight.runs.identity import SCHEMA, cell_folder, is_done, masked, write_config
from fedlight.runs.record import Record
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import remove_temporaries
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.machine import describe_machine
from fedlight.runtime.memory import no_garbage
from fedlight.runtime.signals import stoppable
from fedlight.workers import Order, crew_of

LIBRARIES = ("fedlight", "torch", "lightning", "diffusers", "torch-fidelity", "hydra-core", "numpy")
FEW_CLIENTS = 20  # whose losses are logged one by one


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
    folder = cell_folder(settings)
    cell = folder.name
    if is_done(folder):
        print(f"{cell}: done already, in {folder}")
        return

    parts = build(config, settings)
    method = parts.method
    counts = count_labels(parts.dataset.train.labels, parts.shares, len(parts.dataset.classes))

    _make_folder(folder)
    write_config(folder / "config.yaml", plain)
    write_partition(folder / "partition.csv", counts, parts.dataset.classes)
    pictures.partition_heatmap(folder / "partition.png", counts, parts.dataset.classes, cell)
    if settings.evaluation.grid:
        real = parts.dataset.test.pixels[: settings.evaluation.grid]
        pictures.sample_grid(
            folder / "samples" / "real.png", [("", real)], f"{settings.data.name}: real images"
        )
    store = Store(folder / "checkpoint", cell)
    federator = Federator(method, parts.slices, parts.module, store)
    federation = Federation(
        settings.rounds, settings.clients, settings.fraction, settings.federation.dropout, settings.seed
    )
    record = Record(folder, _blank_result(cell, settings, federator))
    result = record.result
    bars = ProgressBars(cell, settings.rounds)

    def note(noted: dict[str, Any], exchange: list[Entry]) -> None:
        total = federator.ledger.totals(federator.model_params)
        record.note(noted, map(asdict, exchange), total)
        log.pictures(noted["row"]["round"], samples=grid_path(folder, noted["row"]["round"]))
        bars.end_round(noted["row"]["train_loss"])

    def evaluate(round_: int, on_step: Callable[[], None]) -> dict[str, Any] | None:
        begun = time.perf_counter()
        score = score_models(folder, round_, federator, parts, settings, bars, on_step)
        if score.memorisation:
            pictures.memorisation_histogram(folder / "memorisation.png", *score.memorisation, cell)
        record.spend(evaluation=time.perf_counter() - begun)
        return score.fid

    with stoppable() as stop, record.closing(), bars:
        with no_garbage():
            record.log = log = CellLog(config.logger, folder, settings.name, cell, plain)
        saved = store.resume(federator.keeping)
        if saved:
            print(f"{cell}: goes on after round {saved.round}", file=sys.stderr)
            federator.state, result["seconds"] = saved.state, saved.history["seconds"]
            for noted, exchange in zip(
                saved.history["rounds"], replay(federator, federation, saved.round), strict=True
            ):
                note(noted, exchange)
        if settings.rounds == 0:
            result["fid"] = evaluate(0, stop.check)
            log.pictures(0, samples=grid_path(folder, 0))
        train = _trainers(folder, config, settings, parts, federator, bars, stop.check)
        for done in federate(federator, train, federation, done=saved.round if saved else 0):
            fid = evaluate(done.round, stop.check) if is_due(done.round, settings) else None
            record.spend(training=done.training, merging=done.merging, checkpoint=store.take_seconds())
            record.tick()
            noted = _noted(done, federator, fid, settings)
            history = {"rounds": [*record.rounds, noted], "seconds": result["seconds"]}
            store.commit(Saved(done.round, federator.state, history))
            note(noted, done.exchange)

        record.spend(checkpoint=store.take_seconds())
        _save_model(folder / "model", federator, parts.module)
        result["state_sha256"] = state_sha256(federator.state)
        if method.evaluate == "clients":
            result["client_sha256"] = [
                state_sha256(federator.client_state(client)) for client in range(settings.clients)
            ]
        log.pictures(settings.rounds, partition=folder / "partition.png")
    told = "" if result["train_loss"] is None else f"loss {result['train_loss']:.4f}, "
    told += f"FID {result['fid']['value']:.1f}, " if result["fid"] else ""
    exchanged = result["exchange"]["params_total"]
    print(
        f"{cell}: {told}{exchanged:,} parameters exchanged, {result['seconds']['total']:.0f} s, in {folder}"
    )


def _trainers(
    folder: Path,
    config: DictConfig,
    settings: CellConfig,
    parts: Parts,
    federator: Federator,
    bars: ProgressBars,
    check: Callable[[], None],
) -> Callable[[list[Task]], None]:
    """What trains the clients of a round: this process, with helpers where there is room for them."""
    halt = LambdaCallback(on_train_batch_end=lambda *_: check())
    here = parts.updater(federator, settings, [bars, halt])
    helpers = worker_count(settings, parts.device) - 1 if settings.rounds else 0
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if helpers:
        crew_of(helpers).get_ready(folder, resolved)

    def train(tasks: list[Task]) -> None:
        bars.start_round(len(tasks))
        if not helpers:
            for task in tasks:
                here(task)
            return
        for task, files in crew_of(helpers).train(
            tasks,
            here,
            lambda task: Order(folder, resolved, task, federator.store.files(task.client)),
            lambda task: bars.end_update(),
            check,
        ):
            federator.store.adopt(task.client, files)

    return train


def _noted(
    done: Round, federator: Federator, fid: dict[str, Any] | None, settings: CellConfig
) -> dict[str, Any]:
    """What is noted of a round: its row of `rounds.csv`, its losses and its scores."""
    total = federator.ledger.totals(federator.model_params)
    row = {
        "round": done.round,
        "train_loss": done.train_loss,
        "params_down": sum(entry.params for entry in done.exchange if entry.direction == "down"),
        "params_up": sum(entry.params for entry in done.exchange if entry.direction == "up"),
        "params_cumulative": total["params_total"],
        "bytes_cumulative": total["bytes_total"],
        "participants": done.participants,
        "reports": len(done.client_losses),
        "fid": fid and fid["value"],
        "seconds": round(done.training + done.merging, 3),
    }
    losses = {str(client): loss for client, loss in done.client_losses.items()}
    return {"row": row, "client_losses": losses if settings.clients <= FEW_CLIENTS else {}, "fid": fid}


def _make_folder(folder: Path) -> None:
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        remove_temporaries(folder)
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
        "machine": describe_machine() | {"precision": precision(settings)},
        "error": None,
    }


def _save_model(folder: Path, federator: Federator, module: DDPM) -> None:
    """Saves the federated model in the layout of diffusers' `from_pretrained`."""
    from diffusers import DDPMPipeline  # brings all of diffusers' models, a second or two

    module.load_state_dict(federator.global_state())
    unet = module.denoiser.to(memory_format=torch.contiguous_format)
    DDPMPipeline(unet, module.schedule).save_pretrained(folder)
