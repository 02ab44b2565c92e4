"""One cell from configuration to result: build, federate, evaluate, write."""

import platform
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import LambdaCallback

from fedlight.config import CellConfig
from fedlight.data.partition import count_labels
from fedlight.experiment.evaluate import evaluate_models, grid_path, is_due
from fedlight.experiment.extensions import user_code_error
from fedlight.experiment.guarantee import Guarantee
from fedlight.experiment.pipeline import save_pipeline
from fedlight.experiment.setup import CHECKPOINT, Components, announce, build, make_server
from fedlight.federation.checkpoint import ServerCheckpoint, last_versions
from fedlight.federation.cohort import cohort_size
from fedlight.federation.ledger import Entry
from fedlight.federation.rounds import Round, federate
from fedlight.federation.server import Server
from fedlight.loggers import pictures
from fedlight.loggers.bars import ProgressBars
from fedlight.loggers.metrics import CellLog
from fedlight.runs.checksums import CHECKSUMS, find_lost_file, write_checksums
from fedlight.runs.clock import Clock, Spent
from fedlight.runs.csv_files import write_partition
from fedlight.runs.identity import SCHEMA, cell_folder, is_done, print_done, write_config
from fedlight.runs.record import Record
from fedlight.runtime.errors import BadInput, Damaged, Diverged, ExtensionFailed, MemoryLost
from fedlight.runtime.files import remove_temporaries
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.lease import HEARTBEAT, Lease
from fedlight.runtime.machine import describe_machine
from fedlight.runtime.memory import pause_garbage_collection
from fedlight.runtime.secret import masked
from fedlight.runtime.signals import Stop, stoppable

LIBRARIES = ("fedlight", "torch", "lightning", "diffusers", "torch-fidelity", "hydra-core", "numpy")
FEW_CLIENTS = 20  # whose losses are logged one by one


def run_cell(config: CellConfig, lease: Lease, make: Callable[[CellConfig], Components] = build) -> None:
    """Runs the cell that the configuration describes, or skips it where it is done.

    Args:
        config: of the cell.
        lease: of its folder.
        make: what builds it; a server without images of its own builds another one.

    Raises:
        BadInput: the cell cannot be run as asked; nothing was written.
        Diverged: a client's loss left the finite numbers; `result.json` says so.
        LeaseTaken: another process took the lease over.
    """
    folder = cell_folder(config)
    cell = folder.name
    if is_done(folder):
        print_done(folder)
        return
    plain = masked(config.plain())
    components = make(config)
    config = components.config
    announce(components.dataset)
    if advice := _label_advice(config):
        _mention_once(advice)
    _make_folder(folder)
    write_config(folder / "config.yaml", plain)

    server = make_server(
        cell,
        config,
        components.module,
        components.slices,
        components.algorithm,
        components.codec,
        folder / CHECKPOINT,
    )
    precision = components.make_trainer().precision
    record = Record(folder, _blank_result(cell, config, server, precision), lease.check)
    result = record.result
    bars = ProgressBars(cell, config.rounds, cohort_size(config.clients, config.fraction))
    with stoppable() as stop, record.closing(), bars, ExitStack() as ending:
        _picture_data(folder, components)
        with pause_garbage_collection():
            log = CellLog(config.logger, folder, config.name, cell, plain)
        record.on_close = log.finish
        run = Run(folder, components, server, record, log, bars, stop, lease, ending)
        try:
            run.federate()
        except (BadInput, Damaged, Diverged, OSError):
            raise
        except Exception as error:
            if message := user_code_error(error, config):
                raise ExtensionFailed(message) from error
            raise
        lease.check()
        if server.method.evaluate == "global":
            components.module.load_state_dict(server.global_state())
            save_pipeline(folder / "model", components.module)
        models = [path for path in sorted((folder / "model").rglob("*")) if path.is_file()]
        write_checksums(folder, [*models, *last_versions(folder / CHECKPOINT)])
        result["state_sha256"] = state_sha256(server.evaluated)
        log.pictures(config.rounds, partition=folder / "partition.png")
    parts = [] if result["train_loss"] is None else [f"loss {result['train_loss']:.4f}"]
    parts += [f"FID {result['fid']['value']:.1f}"] if result["fid"] else []
    parts += [f"{result['exchange']['params_total']:,} parameters exchanged"]
    print(f"{cell}: {', '.join(parts)}, {result['seconds']['total']:.0f} s, in {folder}")


@dataclass
class Run:
    """The rounds of a cell, with what is written, shown and evaluated after each."""

    folder: Path
    components: Components
    server: Server
    record: Record
    log: CellLog
    bars: ProgressBars
    stop: Stop
    lease: Lease
    ending: ExitStack

    def __post_init__(self) -> None:
        self.config, check = self.components.config, self._check
        self.guarantee: Guarantee | None = None
        if self.config.privacy:
            built, checkpoint = self.components, self.folder / CHECKPOINT
            self.guarantee = Guarantee(self.config, built.shares, built.method, checkpoint)
            self.record.result["privacy"] = self.guarantee.entry(self.guarantee.epsilons(0))
        self.checkpoint = ServerCheckpoint(self.folder / CHECKPOINT, self.folder.name)
        self.clock = Clock(self.folder / ".clock.json")
        halt = LambdaCallback(on_train_batch_end=lambda *_: check())
        self.here = self.components.site(self.folder, [self.bars, halt], check)
        self.transport = self.components.transport(
            self.folder, self.here, self.server, self.bars.end_update, check, self.ending
        )

    def federate(self) -> None:
        """Goes on after the last round that was stored; goes back where a client lost its memory."""
        before: int | None = None
        while True:
            self._resume(before)
            try:
                if self.config.rounds == 0:
                    self.record.result["fid"] = self._evaluate()
                    self.log.pictures(0, samples=grid_path(self.folder, 0))
                for done in federate(self.server, self.transport, self.config.rounds):
                    self._end_round(done)
                self._fingerprint_clients()
                break
            except MemoryLost as lost:
                before = self.server.round
                print(f"fedlight: checkpoint: {lost}; going back a round", file=sys.stderr)
        self.here.journal.clear()
        self.clock.clear()
        self.record.spend(checkpoint=self._checkpoint_seconds())

    def _resume(self, before: int | None) -> None:
        record, server = self.record, self.server
        history = server.resume(self.checkpoint, before)
        if before is None and record.earlier_rounds > server.round:
            lost = f"{CHECKPOINT}/server-r{record.earlier_rounds:04d}"
            print(f"fedlight: checkpoint: {lost} is missing or damaged; going back", file=sys.stderr)
        record.begin()
        if history:
            print(f"{self.folder.name}: goes on after round {server.round}", file=sys.stderr)
            record.result["seconds"] = history["seconds"]
        for noted in history["rounds"] if history else ():
            round_ = noted["row"]["round"]
            self._note(noted, [entry for entry in server.ledger.entries if entry.round == round_])
        self.bars.go_on_after(server.round)
        earlier = self.clock.spent_after(server.round) if before is None else Spent()
        record.spend(total=earlier.total)
        self._begin_round(earlier)

    def _begin_round(self, earlier: Spent) -> None:
        """Starts to count the time after a stored round, in which earlier processes spent some already."""
        self._stored, self._earlier = self.server.round, earlier
        self._begun = time.perf_counter()
        self._trained: float | None = None

    def _end_round(self, done: Round) -> None:
        self._trained = done.training + self._earlier.training
        done = replace(done, training=self._trained)
        fid = self._evaluate() if is_due(done.round, self.config) else None
        self.record.spend(training=done.training, merging=done.merging, checkpoint=self._checkpoint_seconds())
        self.record.tick()
        noted = _noted(done, self.server, fid, self.config)
        if self.guarantee:
            noted["privacy"] = self.guarantee.entry(self.guarantee.epsilons(done.round))
            noted["row"]["epsilon"] = noted["privacy"]["epsilon"]
        history = {"rounds": [*self.record.rounds, noted], "seconds": self.record.result["seconds"]}
        self.lease.check()
        self.server.save(self.checkpoint, history)
        self._begin_round(Spent())
        self._note(noted, done.outcome.exchange)
        self.bars.end_round(noted["row"]["train_loss"])

    def _note(self, noted: dict[str, Any], exchange: list[Entry]) -> None:
        row = noted["row"]
        total = self.server.ledger.totals(self.server.model_params)
        self.record.note(noted, map(asdict, exchange), total)
        if "privacy" in noted:
            self.record.result["privacy"] = noted["privacy"]
        self.log.round(row, noted["client_losses"], noted["fid"] or {})
        self.log.pictures(row["round"], samples=grid_path(self.folder, row["round"]))

    def _evaluate(self) -> dict[str, Any] | None:
        begun = time.perf_counter()
        fid = evaluate_models(
            self.folder, self.server, self.transport, self.components, self.bars, self._check
        )
        self.record.spend(evaluation=time.perf_counter() - begun)
        return fid

    def _fingerprint_clients(self) -> None:
        if self.server.method.evaluate == "clients":
            met, clients = self.server.met, range(self.config.clients)
            strangers = [client for client in clients if client not in met]  # all hold the same model
            # an institution may not answer: its place holds None
            asked = self.server.evaluations(sorted(met) + strangers[:1], draw=False)
            found = {scores.client: scores.sha256 for scores in self.transport.evaluate(asked)}
            own = [found.get(client if client in met else strangers[0]) for client in clients]
            self.record.result["client_sha256"] = own

    def _check(self) -> None:
        """Ends the cell where it is to end; notes the time."""
        training = self._earlier.training + time.perf_counter() - self._begun
        spent = Spent(
            self._earlier.total + self.record.running, training if self._trained is None else self._trained
        )
        self.clock.mark(self._stored, spent)
        self.stop.check()
        self.lease.check(every=HEARTBEAT)

    def _checkpoint_seconds(self) -> float:
        return self.checkpoint.watch.take() + self.here.take_seconds()


def _label_advice(config: CellConfig) -> str | None:
    """What makes labels visible where an averaged model is sampled without guidance; else None."""
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
def _mention_once(message: str) -> None:
    """Prints a line once a process, however many cells it is about."""
    print(f"fedlight: {message}", file=sys.stderr)


def _picture_data(folder: Path, components: Components) -> None:
    """Writes and draws who holds what, and real images."""
    dataset, config = components.dataset, components.config
    counts = count_labels(dataset.train.labels, components.shares, len(dataset.classes))
    write_partition(folder / "partition.csv", counts, dataset.classes)
    pictures.partition_heatmap(folder / "partition.png", counts, dataset.classes, folder.name)
    if config.evaluation.grid:
        real = dataset.test.pixels[: config.evaluation.grid]
        title = f"{config.data.name}: real images"
        pictures.sample_grid(folder / "samples" / "real.png", [("", real)], title)


def _noted(done: Round, server: Server, fid: dict[str, Any] | None, config: CellConfig) -> dict[str, Any]:
    """What is noted of a round: its row of `rounds.csv`, its losses and its scores."""
    total, outcome = server.ledger.totals(server.model_params), done.outcome
    row = {
        "round": done.round,
        "train_loss": outcome.train_loss,
        "params_down": sum(entry.params for entry in outcome.exchange if entry.direction == "down"),
        "params_up": sum(entry.params for entry in outcome.exchange if entry.direction == "up"),
        "params_cumulative": total["params_total"],
        "bytes_cumulative": total["bytes_total"],
        "participants": outcome.cohort,
        "reports": outcome.reports,
        "fid": fid and fid["value"],
        "seconds": round(done.training + done.merging, 3),
    }
    losses = {str(client): loss for client, loss in outcome.client_losses.items()}
    return {"row": row, "client_losses": losses if config.clients <= FEW_CLIENTS else {}, "fid": fid}


def _make_folder(folder: Path) -> None:
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


def _blank_result(cell: str, config: CellConfig, server: Server, precision: str) -> dict[str, Any]:
    """`result.json` before the first round; `precision` is that of the clients' Trainers."""
    return {
        "schema": SCHEMA,
        "status": "failed",
        "cell": cell,
        "name": config.name,
        "method": config.method.name,
        "clients": config.clients,
        "rounds": config.rounds,
        "epochs": config.epochs,
        "fraction": config.fraction,
        "seed": config.seed,
        "data": config.data.name,
        "partition": config.partition.name,
        "model": config.model.name,
        "model_params": server.model_params,
        "slices": server.slice_params(),
        "exchange": server.ledger.totals(server.model_params),
        "train_loss": None,
        "fid": None,
        "state_sha256": None,
        "client_sha256": [],
        "seconds": dict.fromkeys(("total", "training", "merging", "evaluation", "checkpoint"), 0.0),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "machine": describe_machine() | {"precision": precision},
        "error": None,
    }
