"""The rounds of a cell, from the last stored one to the end."""

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import LambdaCallback

from fedlight.experiment.background import BackgroundEvaluation, EvaluationTask
from fedlight.experiment.clients import make_site, make_transport
from fedlight.experiment.early_stopping import find_stop
from fedlight.experiment.evaluate import count_models, evaluate_models
from fedlight.experiment.flops import ImageFlops, denoised_images, trained_images
from fedlight.experiment.parts import CHECKPOINT, CellParts
from fedlight.experiment.privacy_account import PrivacyAccount
from fedlight.experiment.result import round_record, score_columns
from fedlight.experiment.sample_grid import grid_path
from fedlight.experiment.scored_models import is_evaluation_round
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.ledger import Entry
from fedlight.federation.server import Outcome, Server
from fedlight.federation.transport.transport import Deployment
from fedlight.loggers.bars import ProgressBars
from fedlight.loggers.metrics import CellLog
from fedlight.runs.clock import Clock, Spent
from fedlight.runs.record import Record
from fedlight.runtime.errors import MemoryLost
from fedlight.runtime.lease import HEARTBEAT, Lease
from fedlight.runtime.signals import Stop
from fedlight.runtime.usage import UsageLog, UsageMeter

PENDING = "pending"
"""Key of a stored round whose models are being evaluated in the background."""


@dataclass
class RoundLoop:
    """The rounds of a cell: each is trained, evaluated where it is due, and stored.

    Attributes:
        folder: of the cell.
        parts: of the cell.
        server: before its first round.
        record: the tables and the result of the cell.
        log: of the cell's logger.
        bars: show the progress.
        stop: ends the cell after a signal.
        lease: of the folder.
        exit_stack: closes the transport's resources when the cell ends.
        deployment: None in a simulation.
        meter: measures this process since the start of the cell.
        startup: seconds from the start of the cell until now.
    """

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
    meter: UsageMeter
    startup: float

    def __post_init__(self) -> None:
        self.config = self.parts.config
        self.usage = UsageLog()
        self._image_flops: ImageFlops | None = None
        if self.deployment is None:  # before training, which then uses the memory again
            self._image_flops = self.parts.image_flops
        self._earlier_memory: dict[str, Any] | None = None
        self.background: BackgroundEvaluation | None = None
        every = self.config.evaluation.every
        if self.config.evaluation.background and every is not None and every < self.config.rounds:
            task = EvaluationTask(self.config, self.folder.absolute(), self.parts.noise)
            self.background = BackgroundEvaluation(task, self.check)
            self.exit_stack.callback(self.background.forget)
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
            self.parts,
            self.folder,
            self.site,
            self.server,
            self,
            self.exit_stack,
            self.deployment,
            self.usage,
        )

    def run(self) -> None:
        """Runs the rounds after the last stored one; goes back a round if a client's stored state is gone."""
        before_round: int | None = None
        while True:
            try:
                self._resume(before_round)
                if self.config.rounds == 0:
                    self.record.result["fid"] = self._evaluate()
                    self._count_sampling(count_models(self.config, self.server))
                    self.log.pictures(0, samples=grid_path(self.folder, 0))
                while self.server.round < self.config.rounds and not self._find_stop():
                    begun = time.perf_counter()
                    broadcasts = self.server.start_round()
                    for update in self.transport.exchange(broadcasts):
                        self.server.receive(update)
                    outcome = self.server.finish_round()
                    self._end_round(outcome, time.perf_counter() - begun)
                self._fingerprint_clients()
                break
            except MemoryLost as lost:
                before_round = self.server.round
                if self.background and self.background.round is not None:
                    before_round = min(before_round, self.background.round)
                    self.background.forget()
                print(f"fedlight: checkpoint: {lost}; going back a round", file=sys.stderr)
        self._note_stop()
        self.site.journal.clear()
        self.clock.clear()
        self.record.spend(checkpoint=self._checkpoint_seconds())
        self._note_usage()

    def _resume(self, before_round: int | None) -> None:
        """Restores server and tables after the last stored round, or the last one before `before_round`."""
        record, server = self.record, self.server
        history = server.resume(self.checkpoint, before_round)
        if before_round is None and record.earlier_rounds > server.round:
            lost = f"{CHECKPOINT}/server-r{record.earlier_rounds:04d}"
            print(f"fedlight: checkpoint: {lost} is missing or damaged; going back", file=sys.stderr)
        record.begin()
        if history:
            print(f"{self.folder.name}: goes on after round {server.round}", file=sys.stderr)
            record.result["seconds"] |= history["seconds"]
        none = dict.fromkeys(("training", "sampling", "total"), 0) if self._image_flops else None
        record.result["flops"] = history.get("flops") if history else none
        self._earlier_memory = history.get("memory") if history else None
        record.spend(startup=self.startup if before_round is None else 0.0)
        record.result.pop("parent", None)
        if history and (parent := history.get("parent")):
            record.result["parent"] = parent
        for round_entry in history["rounds"] if history else ():
            round_ = round_entry["row"]["round"]
            exchange = [entry for entry in server.ledger.entries if entry.round == round_]
            self._publish(round_entry, exchange)
        self.bars.go_on_after(server.round)
        earlier = self.clock.spent_after(server.round) if before_round is None else Spent()
        record.spend(total=earlier.total)
        self._begin_round(earlier)
        if record.rounds and record.rounds[-1].get(PENDING):
            self._resume_evaluation()

    def _begin_round(self, earlier: Spent) -> None:
        """Starts to count the time after a stored round; `earlier` processes have spent some of it."""
        self._stored_round, self._earlier = self.server.round, earlier
        self._started_at = time.perf_counter()
        self._training_seconds: float | None = None

    def _end_round(self, outcome: Outcome, seconds: float) -> None:
        """Evaluates the models where it is due, stores the round and publishes it.

        Args:
            outcome: of the round.
            seconds: that it took in this process.
        """
        training = self._earlier.training + seconds - outcome.merging
        self._training_seconds = training
        self._collect_scores()
        self._count_training(outcome)
        ends = self._find_stop({"round": outcome.round, "train_loss": outcome.train_loss, "fid": None})
        is_due = is_evaluation_round(outcome.round, self.config) or ends is not None
        is_last = outcome.round == self.config.rounds or ends is not None
        is_pending = is_due and self.background is not None and not is_last
        fid = self._evaluate() if is_due and not is_pending else None
        if is_due:
            self._count_sampling(count_models(self.config, self.server))
        self.record.spend(training=training, merging=outcome.merging, checkpoint=self._checkpoint_seconds())
        self.record.tick()
        round_entry = round_record(outcome, training + outcome.merging, self.server, fid, self.config)
        if self.privacy_account:
            round_entry["privacy"] = self.privacy_account.to_entry(
                self.privacy_account.epsilons(outcome.round)
            )
            round_entry["row"]["epsilon"] = round_entry["privacy"]["epsilon"]
        if is_pending:
            round_entry[PENDING] = True
        self._note_usage()
        result = self.record.result
        history = {"rounds": [*self.record.rounds, round_entry]}
        history |= {key: result[key] for key in ("seconds", "memory", "flops")}
        if parent := result.get("parent"):
            history["parent"] = parent
        self.lease.check()
        self.server.save(self.checkpoint, history)
        if is_pending and self.background:
            self.background.start(outcome.round)
        self._begin_round(Spent())
        self._publish(round_entry, outcome.exchange)
        self.bars.end_round(round_entry["row"]["train_loss"])

    def _publish(self, round_entry: dict[str, Any], exchange: list[Entry]) -> None:
        """Adds a stored round to the tables, the result and the log."""
        row = round_entry["row"]
        total = self.server.ledger.totals(self.server.model_params)
        self.record.note(round_entry, map(asdict, exchange), total)
        if "privacy" in round_entry:
            self.record.result["privacy"] = round_entry["privacy"]
        self.log.round(row, round_entry["client_losses"], round_entry["fid"] or {})
        self.log.pictures(row["round"], samples=grid_path(self.folder, row["round"]))

    def _find_stop(self, *rows: dict[str, Any]) -> str | None:
        """Why the cell ends early after its rounds so far and `rows`; None where it goes on."""
        return find_stop(self.config.early_stopping, [*(entry["row"] for entry in self.record.rounds), *rows])

    def _note_stop(self) -> None:
        """Records why the cell ends before its last round.

        Under privacy the guarantee stays that of all rounds, since the scores decided when to stop.
        """
        rounds = self.config.rounds
        reason = self._find_stop()
        if reason is None or self.server.round == rounds:
            return
        self.record.result["stopped"] = {"round": self.server.round, "reason": reason}
        if self.privacy_account:
            self.record.result["privacy"] = self.privacy_account.to_entry(
                self.privacy_account.epsilons(rounds)
            )

    def _evaluate(self) -> dict[str, Any] | None:
        begun = time.perf_counter()
        fid = evaluate_models(
            self.folder,
            self.server,
            self.transport.evaluate,
            self.parts.model_evaluator,
            self.bars,
            self.check,
        )
        sampling = self.parts.drawing.take() + self.usage.take_sampling()
        self.record.spend(evaluation=time.perf_counter() - begun, sampling=sampling)
        return fid

    def _resume_evaluation(self) -> None:
        """Evaluates the last stored round, whose evaluation an earlier process began and did not end."""
        if self.background:
            self.background.start(self.server.round)
        else:
            self._add_scores(self._evaluate())

    def _collect_scores(self) -> None:
        """Waits for the evaluation in the background, if there is one, and adds its scores to its round."""
        if self.background is None or self.background.round is None:
            return
        scored = self.background.collect()
        self.background.forget()
        self.usage.note(scored.usage)
        self.record.spend(evaluation=scored.seconds, sampling=self.usage.take_sampling())
        self._add_scores(scored.fid)

    def _add_scores(self, fid: dict[str, Any] | None) -> None:
        """Adds the scores of the last stored round to the tables, the result and the log."""
        entry, columns = self.record.rounds[-1], score_columns(fid)
        del entry[PENDING]
        self.record.amend(fid, columns)
        round_ = entry["row"]["round"]
        self.log.scores(round_, columns, fid or {})
        self.log.pictures(round_, samples=grid_path(self.folder, round_))

    def _count_training(self, outcome: Outcome) -> None:
        """Adds the floating-point operations of the local updates of a round."""
        if self._image_flops:
            sizes = self.parts.training_indices
            images = sum(trained_images(self.config, len(sizes[client])) for client in outcome.num_examples)
            self._count_flops("training", images * self._image_flops.training)

    def _count_sampling(self, models: int) -> None:
        """Adds the floating-point operations of an evaluation of so many models."""
        if self._image_flops:
            images = denoised_images(self.config, models)
            self._count_flops("sampling", images * self._image_flops.denoising)

    def _count_flops(self, kind: str, number: float) -> None:
        if flops := self.record.result["flops"]:
            flops |= {name: flops[name] + round(number) for name in (kind, "total")}

    def _note_usage(self) -> None:
        """Records the peak memory of the cell's processes so far."""
        self.record.result["memory"] = self.usage.memory(self.meter.read(0.0), self._earlier_memory)

    def _fingerprint_clients(self) -> None:
        """Records the hash of each client's own model; None for an institution that does not answer."""
        if self.server.method.evaluate != "clients":
            return
        met, clients = self.server.met, range(self.config.clients)
        untrained = [client for client in clients if client not in met]  # they all have the same model
        requests = self.server.evaluations(sorted(met) + untrained[:1], draw=False)
        hashes = {scores.client: scores.sha256 for scores in self.transport.evaluate(requests)}
        self.record.result["client_sha256"] = [
            hashes.get(client if client in met else untrained[0]) for client in clients
        ]

    def end_update(self) -> None:
        """Counts a local update that another process did."""
        self.bars.end_update()

    def check(self) -> None:
        """Stores the time; raises an exception where a signal or a lost lease ends the cell."""
        training = self._earlier.training + time.perf_counter() - self._started_at
        spent = Spent(
            self._earlier.total + self.record.running,
            training if self._training_seconds is None else self._training_seconds,
        )
        self.clock.mark(self._stored_round, spent)
        self.stop.check()
        self.lease.check(every=HEARTBEAT)

    def _checkpoint_seconds(self) -> float:
        return self.checkpoint.watch.take() + self.site.take_seconds()
