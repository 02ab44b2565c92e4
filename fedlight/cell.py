"""One cell from configuration to result: build, federate, score, write."""

import platform
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from omegaconf import DictConfig, OmegaConf

from fedlight.config import CellConfig
from fedlight.data.client_data import ClientData
from fedlight.data.partition import count_labels, pool
from fedlight.diffusion.ddpm import DDPM
from fedlight.federation.federator import Federator
from fedlight.federation.rounds import federate
from fedlight.federation.store import Store
from fedlight.parts import build
from fedlight.runtime.errors import BadInput
from fedlight.runtime.hashing import state_sha256
from fedlight.scoring import Score, is_due, score_models
from fedlight.tracking import loggers, pictures
from fedlight.tracking.cell import SCHEMA, cell_id, masked, read_result, write_config, write_result
from fedlight.tracking.progress import ProgressBars
from fedlight.tracking.tables import LEDGER_COLUMNS, ROUND_COLUMNS, Table, write_partition

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
    cell = cell_id(settings.model_dump(mode="json", by_alias=True))
    folder = Path(settings.output) / settings.name / cell
    if (read_result(folder) or {}).get("status") == "completed":
        print(f"{cell}: done already, in {folder}")
        return

    start = time.perf_counter()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
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
    rounds_csv = Table(folder / "rounds.csv", ROUND_COLUMNS)
    ledger_csv = Table(folder / "ledger.csv", LEDGER_COLUMNS)

    store = Store(folder / "checkpoint")
    store.clear()
    federator = Federator(method, parts.slices, parts.module, store)
    result = _blank_result(cell, settings, federator)
    seconds = result["seconds"]
    bars = ProgressBars(cell, settings.rounds)
    shares = [pool(parts.shares)] if method.pool else parts.shares
    logger = None

    def evaluate(round_: int) -> Score:
        begun = time.perf_counter()
        score = score_models(folder, round_, federator, parts, settings, bars)
        if score.memorisation:
            pictures.memorisation_histogram(folder / "memorisation.png", *score.memorisation, cell)
        seconds["evaluation"] += time.perf_counter() - begun
        result["fid"] = score.fid
        loggers.log_pictures(logger, round_, samples=score.grid)
        return score

    try:
        logger = loggers.make_logger(config.logger, folder, settings.name, cell, plain)
        with bars:
            if settings.rounds == 0:
                evaluate(0)
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
                fid = evaluate(done.round).fid if is_due(done.round, settings) else None
                row = {
                    "round": done.round,
                    "train_loss": done.train_loss,
                    "params_down": sum(e.params for e in done.exchange if e.direction == "down"),
                    "params_up": sum(e.params for e in done.exchange if e.direction == "up"),
                    "params_cumulative": exchange["params_total"],
                    "bytes_cumulative": exchange["bytes_total"],
                    "participants": done.participants,
                    "reports": len(done.client_losses),
                    "fid": fid and fid["value"],
                    "seconds": round(done.training + done.merging, 3),
                }
                rounds_csv.append([row])
                ledger_csv.append(asdict(entry) for entry in done.exchange)
                losses = done.client_losses if settings.clients <= FEW_CLIENTS else {}
                loggers.log_round(logger, row, losses, fid or {})
                bars.end_round(done.train_loss)
        store.put_global(federator.state)
        _save_model(folder / "model", federator, parts.module)
        result["state_sha256"] = state_sha256(federator.state)
        if method.evaluate == "clients":
            result["client_sha256"] = [
                state_sha256(federator.client_state(client)) for client in range(settings.clients)
            ]
        loggers.log_pictures(logger, settings.rounds, partition=folder / "partition.png")
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
    told = "" if result["train_loss"] is None else f"loss {result['train_loss']:.4f}, "
    told += f"FID {result['fid']['value']:.1f}, " if result["fid"] else ""
    exchanged = result["exchange"]["params_total"]
    print(f"{cell}: {told}{exchanged:,} parameters exchanged, {seconds['total']:.0f} s, in {folder}")


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
        "error": None,
    }


def _save_model(folder: Path, federator: Federator, module: DDPM) -> None:
    """Saves the federated model in the layout of diffusers' `from_pretrained`."""
    module.load_state_dict(federator.global_state())
    unet = module.denoiser.to(memory_format=torch.contiguous_format)
    DDPMPipeline(unet, module.schedule).save_pretrained(folder)
