"""One cell, from its configuration to its result."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from fedlight.config import CellConfig
from fedlight.data.loading import print_notes
from fedlight.data.partition import count_labels
from fedlight.experiment.beginning import take_beginning
from fedlight.experiment.parts import CHECKPOINT, CellParts
from fedlight.experiment.pipeline import make_pipeline, save_pipeline
from fedlight.experiment.result import blank_result
from fedlight.experiment.round_loop import RoundLoop
from fedlight.experiment.setup import make_cell_server, set_up
from fedlight.experiment.user_code import user_code_error
from fedlight.federation.checkpoint import last_versions
from fedlight.federation.cohort import cohort_size
from fedlight.federation.server import Server
from fedlight.federation.transport.transport import Deployment
from fedlight.finetuning.adapters import ADAPTER_FOLDER, has_adapters, save_adapter
from fedlight.loggers import pictures
from fedlight.loggers.bars import ProgressBars
from fedlight.loggers.metrics import CellLog
from fedlight.runs.beginnings import explain_other_sums, find_beginning
from fedlight.runs.checksums import CHECKSUMS, find_lost_file, write_checksums
from fedlight.runs.csv_files import write_partition
from fedlight.runs.identity import cell_folder, is_done, print_done, write_config
from fedlight.runs.reader import flatten
from fedlight.runs.record import Record
from fedlight.runtime.errors import BadInput, Damaged, Diverged, ExtensionFailed
from fedlight.runtime.files import remove_temporaries
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.lease import Lease
from fedlight.runtime.memory import pause_garbage_collection
from fedlight.runtime.secret import masked
from fedlight.runtime.signals import stoppable
from fedlight.runtime.usage import UsageMeter


def run_cell(
    config: CellConfig,
    lease: Lease,
    make: Callable[[CellConfig], CellParts] = set_up,
    deployment: Deployment | None = None,
    begun: float | None = None,
    shorter: Path | None = None,
) -> None:
    """Runs the cell that the configuration describes, or skips it where it is done.

    The rounds of a completed cell in the same sweep whose configuration differs in its rounds alone are taken
    over instead of being trained again.

    Args:
        config: of the cell.
        lease: of its folder.
        make: makes its parts; a server without images of its own makes other ones.
        deployment: None in a simulation.
        begun: `time.perf_counter` when the command began with the cell, before it loaded any library; None
            for now.
        shorter: folder of the finished cell to go on from, in place of one of the sweep.

    Raises:
        BadInput: the cell cannot be run as configured; nothing was written.
        Diverged: a client's loss left the finite numbers; `result.json` says so.
        LeaseTaken: another process took the lease over.
    """
    begun = time.perf_counter() if begun is None else begun
    folder = cell_folder(config)
    cell = folder.name
    if is_done(folder):
        print_done(folder)
        return
    meter = UsageMeter("cell")
    plain = masked(config.plain())
    parts = make(config)
    print_notes(parts.dataset)
    if advice := _label_advice(config):
        _print_once(advice)
    _make_folder(folder)
    write_config(folder / "config.yaml", plain)

    server = make_cell_server(cell, parts, folder / CHECKPOINT)
    precision = parts.make_trainer().precision
    record = Record(folder, blank_result(cell, config, server, precision), lease.check)
    result = record.result
    if config.trainer.fuse:
        result["fuse"] = parts.fuse
    bars = ProgressBars(cell, config.rounds, cohort_size(config.clients, config.fraction))
    with stoppable() as stop, record.closing(), bars, ExitStack() as exit_stack:
        _picture_data(folder, parts)
        with pause_garbage_collection():
            log = CellLog(config.logger, folder, config.name, cell, plain)
        record.on_close = log.finish
        loop = RoundLoop(
            folder,
            parts,
            server,
            record,
            log,
            bars,
            stop,
            lease,
            exit_stack,
            deployment,
            meter,
            startup=time.perf_counter() - begun,
        )
        try:
            if deployment is None and config.rounds:
                _start_from(shorter, loop, plain)
            loop.run()
        except (BadInput, Damaged, Diverged, OSError):
            raise
        except Exception as error:
            if message := user_code_error(error, config):
                raise ExtensionFailed(message) from error
            raise
        lease.check()
        _save_models(folder, parts, server)
        result["state_sha256"] = state_sha256(server.evaluated)
        log.pictures(server.round, partition=folder / "partition.png")
    figures = [] if result["train_loss"] is None else [f"loss {result['train_loss']:.4f}"]
    figures += [f"FID {result['fid']['value']:.1f}"] if result["fid"] else []
    figures += [f"{result['exchange']['params_total']:,} parameters exchanged"]
    print(f"{cell}: {', '.join(figures)}, {result['seconds']['total']:.0f} s, in {folder}")


def _start_from(shorter: Path | None, loop: RoundLoop, plain: dict[str, Any]) -> None:
    """Takes over the rounds of a shorter cell, where they are more than this cell has stored.

    Args:
        shorter: folder of the shorter cell; None to look for one in the sweep, left out if damaged.
        loop: of this cell.
        plain: configuration of this cell, without secrets.

    Raises:
        Damaged: the given cell is damaged.
    """
    folder, config, result = loop.folder, loop.config, loop.record.result
    beginning = shorter or find_beginning(folder, plain, result)
    if beginning is None:
        return
    if shorter and (difference := explain_other_sums(shorter, flatten(plain), result)):
        print(
            f"fedlight: {shorter.name}: {difference}: the bits may not be those of a cell trained here alone",
            file=sys.stderr,
        )
    try:
        taken = take_beginning(beginning, folder, config, loop.server, loop.checkpoint, loop.site)
    except Damaged as error:
        if shorter is not None:
            raise
        print(f"fedlight: {error}; {folder.name} is trained from the start", file=sys.stderr)
        return
    if taken:
        print(f"{folder.name}: goes on from round {taken} of {beginning.name}", file=sys.stderr)


def _label_advice(config: CellConfig) -> str | None:
    """The settings that make labels visible, where an averaged model is sampled without guidance."""
    evaluation, method = config.evaluation, config.method
    averaged = method.uplink and not method.pool
    drawn = evaluation.samples or evaluation.grid
    if not (config.model.conditional and averaged and drawn and evaluation.guidance == 1):
        return None
    decay = "" if config.optimizer.decay else " optimizer.decay=cosine"
    return (
        "model.conditional=true with evaluation.guidance=1: averaged models follow labels weakly; for images "
        f"that show their labels set evaluation.guidance=3{decay}"
    )


@cache
def _print_once(message: str) -> None:
    """Prints a line once a process, however many cells it is about."""
    print(f"fedlight: {message}", file=sys.stderr)


def _picture_data(folder: Path, parts: CellParts) -> None:
    """Writes and draws the partition, and draws real images."""
    dataset, config = parts.dataset, parts.config
    counts = count_labels(dataset.train.labels, parts.client_indices, len(dataset.classes))
    write_partition(folder / "partition.csv", counts, dataset.classes)
    pictures.partition_heatmap(folder / "partition.png", counts, dataset.classes)
    if config.evaluation.grid:
        real = dataset.test.pixels[: config.evaluation.grid]
        title = f"{config.data.name}: real images"
        pictures.sample_grid(folder / "samples" / "real.png", [("", real)], title)


def _save_models(folder: Path, parts: CellParts, server: Server) -> None:
    """Saves the global model where it is what was trained, and the checksums of all models.

    Of a model with adapters these are saved alone, without the pretrained weights.
    """
    if server.method.evaluate == "global":
        parts.model.load_state_dict(server.global_state())
        if has_adapters(parts.model.denoiser):
            save_adapter(folder / ADAPTER_FOLDER, parts.model.denoiser)
        else:
            save_pipeline(folder / "model", make_pipeline(parts.model, parts.config, parts.latents))
    saved = [*(folder / "model").rglob("*"), *(folder / ADAPTER_FOLDER).rglob("*")]
    files = [path for path in sorted(saved) if path.is_file()]
    write_checksums(folder, [*files, *last_versions(folder / CHECKPOINT)])


def _make_folder(folder: Path) -> None:
    """Makes the folder of a cell, without the result of an earlier run.

    Raises:
        BadInput: it cannot be written to.
    """
    try:
        for inner in ("samples", CHECKPOINT):
            (folder / inner).mkdir(parents=True, exist_ok=True)
        if lost := find_lost_file(folder):
            print(f"fedlight: {lost} is missing or damaged; it is made again", file=sys.stderr)
        for name in (CHECKSUMS, "result.json"):
            (folder / name).unlink(missing_ok=True)
        remove_temporaries(folder)
    except OSError as error:
        raise BadInput(f"output: cannot write to {folder}: {error.strerror}") from error
