"""One cell from configuration to result: build, federate, evaluate, write."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import LambdaCallback

from fedlight.config import CellConfig
from fedlight.data.loading import print_notes
from fedlight.data.partition import count_labels
from fedlight.experiment.clients import make_site, make_transport
from fedlight.experiment.evaluate import evaluate_models
from fedlight.experiment.parts import CHECKPOINT, CellParts
from fedlight.experiment.pipeline import save_pipeline
from fedlight.experiment.privacy_account import PrivacyAccount
from fedlight.experiment.result import blank_result, round_record
from fedlight.experiment.sample_grid import grid_path
from fedlight.experiment.scored_models import is_evaluation_round
from fedlight.experiment.setup import make_server, set_up
from fedlight.experiment.user_code import user_code_error
from fedlight.federation.checkpoint import ServerCheckpoint, last_versions
from fedlight.federation.cohort import cohort_size
from fedlight.federation.ledger import Entry
from fedlight.federation.server import Outcome, Server
from fedlight.federation.transport.transport import Deployment
from fedlight.loggers import pictures
from fedlight.loggers.bars import ProgressBars
from fedlight.loggers.metrics import CellLog
from fedlight.runs.checksums import CHECKSUMS, find_lost_file, write_checksums
from fedlight.runs.clock import Clock, Spent
from fedlight.runs.csv_files import write_partition
from fedlight.runs.identity import cell_folder, is_done, print_done, write_config
from fedlight.runs.record import Record
from fedlight.runtime.errors import BadInput, Damaged, Diverged, ExtensionFailed, MemoryLost
from fedlight.runtime.files import remove_temporaries
from fedlight.runtime.hashing import state_sha256
from fedlight.runtime.lease import HEARTBEAT, Lease
from fedlight.runtime.memory import pause_garbage_collection
from fedlight.runtime.secret import masked
from fedlight.runtime.signals import Stop, stoppable


def run_cell(
    config: CellConfig,
    lease: Lease,
    make: Callable[[CellConfig], CellParts] = set_up,
    deployment: Deployment | None = None,
) -> None:
    """Runs the cell that the configuration describes, or skips it where it is done.

    Args:
        config: of the cell.
        lease: of its folder.
        make: makes its parts; a server without images of its own makes other ones.
        deployment: None in a simulation.

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
    parts = make(config)
    config = parts.config
    print_notes(parts.dataset)
    if advice := _label_advice(config):
        _mention_once(advice)
    _make_folder(folder)
    write_config(folder / "config.yaml", plain)

    server = make_server(
        cell,
        config,
        parts.model,
        parts.slices,
        parts.algorithm,
        parts.codec,
        parts.noise,
        folder / CHECKPOINT,
    )
    precision = parts.make_trainer().precision
    record = Record(folder, blank_result(cell, config, server, precision), lease.check)
    result = record.result
    bars = ProgressBars(cell, config.rounds, cohort_size(config.clients, config.fraction))
    with stoppable() as stop, record.closing(), bars, ExitStack() as exit_stack:
        _picture_data(folder, parts)
        with pause_garbage_collection():
            log = CellLog(config.logger, folder, config.name, cell, plain)
        record.on_close = log.finish
        run = Run(folder, parts, server, record, log, bars, stop, lease, exit_stack, deployment)
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
            parts.model.load_state_dict(server.global_state())
            save_pipeline(folder / "model", parts.model)
        models = [path for path in sorted((folder / "model").rglob("*")) if path.is_file()]
        write_checksums(folder, [*models, *last_versions(folder / CHECKPOINT)])
        result["state_sha256"] = state_sha256(server.evaluated)
        log.pictures(config.rounds, partition=folder / "partition.png")
    figures = [] if result["train_loss"] is None else [f"loss {result['train_loss']:.4f}"]
    figures += [f"FID {result['fid']['value']:.1f}"] if result["fid"] else []
    figures += [f"{result['exchange']['params_total']:,} parameters exchanged"]
    print(f"{cell}: {', '.join(figures)}, {result['seconds']['total']:.0f} s, in {folder}")


@dataclass
class Run:
    """The rounds of a cell, with what is written, shown and evaluated after each."""

    folder: Path
    parts: CellParts
    server: Server
    record: Record
    log: CellLog
    bars: ProgressBars
    stop: Stop
    lease: Lease
    exit_stack: ExitStack
    deployment: Deployment | None

    def __post_init__(self) -> None:
        self.config = self.parts.config
        self.privacy_account: PrivacyAccount | None = None
        if self.config.privacy:
            parts, checkpoint = self.parts, self.folder / CHECKPOINT
            self.privacy_account = PrivacyAccount(
                self.config, parts.noise, parts.client_indices, parts.method, checkpoint
            )
            self.record.result["privacy"] = self.privacy_account.to_entry(self.privacy_account.epsilons(0))
        self.checkpoint = ServerCheckpoint(self.folder / CHECKPOINT, self.folder.name)
        self.clock = Clock(self.folder / ".clock.json")
        halt = LambdaCallback(on_train_batch_end=lambda *_: self.check())
        self.site = make_site(self.parts, self.folder, [self.bars, halt], self.check)
        self.transport = make_transport(
            self.parts, self.folder, self.site, self.server, self, self.exit_stack, self.deployment
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
                while self.server.round < self.config.rounds:
                    begun = time.perf_counter()
                    broadcasts = self.server.start_round()
                    for update in self.transport.exchange(broadcasts):
                        self.server.receive(update)
                    outcome = self.server.finish_round()
                    self._end_round(outcome, time.perf_counter() - begun)
                self._fingerprint_clients()
                break
            except MemoryLost as lost:
                before = self.server.round
                print(f"fedlight: checkpoint: {lost}; going back a round", file=sys.stderr)
        self.site.journal.clear()
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

    def _end_round(self, outcome: Outcome, seconds: float) -> None:
        """Evaluates and stores a round, which took so many seconds in this process."""
        self._trained = training = seconds - outcome.merging + self._earlier.training
        fid = self._evaluate() if is_evaluation_round(outcome.round, self.config) else None
        self.record.spend(training=training, merging=outcome.merging, checkpoint=self._checkpoint_seconds())
        self.record.tick()
        noted = round_record(outcome, training + outcome.merging, self.server, fid, self.config)
        if self.privacy_account:
            noted["privacy"] = self.privacy_account.to_entry(self.privacy_account.epsilons(outcome.round))
            noted["row"]["epsilon"] = noted["privacy"]["epsilon"]
        history = {"rounds": [*self.record.rounds, noted], "seconds": self.record.result["seconds"]}
        self.lease.check()
        self.server.save(self.checkpoint, history)
        self._begin_round(Spent())
        self._note(noted, outcome.exchange)
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
            self.folder, self.server, self.transport, self.parts.model_evaluator, self.bars, self.check
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

    def end_update(self) -> None:
        """Counts a local update that another process did."""
        self.bars.end_update()

    def check(self) -> None:
        """Ends the cell where it is to end; notes the time."""
        training = self._earlier.training + time.perf_counter() - self._begun
        spent = Spent(
            self._earlier.total + self.record.running, training if self._trained is None else self._trained
        )
        self.clock.mark(self._stored, spent)
        self.stop.check()
        self.lease.check(every=HEARTBEAT)

    def _checkpoint_seconds(self) -> float:
        return self.checkpoint.watch.take() + self.site.take_seconds()


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


def _picture_data(folder: Path, parts: CellParts) -> None:
    """Writes and draws who holds what, and real images."""
    dataset, config = parts.dataset, parts.config
    counts = count_labels(dataset.train.labels, parts.client_indices, len(dataset.classes))
    write_partition(folder / "partition.csv", counts, dataset.classes)
    pictures.partition_heatmap(folder / "partition.png", counts, dataset.classes, folder.name)
    if config.evaluation.grid:
        real = dataset.test.pixels[: config.evaluation.grid]
        title = f"{config.data.name}: real images"
        pictures.sample_grid(folder / "samples" / "real.png", [("", real)], title)


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
