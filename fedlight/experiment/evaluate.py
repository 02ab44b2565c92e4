"""The evaluation of a cell after a round: its models are sampled, pictured and scored."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from fedlight.config import CellConfig
from fedlight.diffusion.sampling import sampling_steps
from fedlight.evaluation.memorisation import Memorisation
from fedlight.experiment.drawing import images_per_model
from fedlight.experiment.fid_entry import fid_entry
from fedlight.experiment.model_evaluation import ModelEvaluation
from fedlight.experiment.model_evaluator import ModelEvaluator
from fedlight.experiment.sample_grid import MAX_CLIENTS, draw_sample_grid
from fedlight.experiment.scored_models import scored_clients
from fedlight.federation.messages import Evaluation, Scores
from fedlight.federation.server import Server
from fedlight.loggers import pictures
from fedlight.loggers.bars import ProgressBars

AskClients: TypeAlias = Callable[[Iterable[Evaluation]], Iterable[Scores]]
"""Sends requests to clients; yields their answers in any order, without those that do not answer."""


def count_models(config: CellConfig, server: Server) -> int:
    """How many models an evaluation draws images from, where every client answers."""
    if server.method.evaluate == "global":
        return 1
    clients = len(scored_clients(config, server.trained))
    return clients if config.evaluation.samples else min(clients, MAX_CLIENTS)


def evaluate_models(
    folder: Path,
    server: Server,
    ask_clients: AskClients,
    model_evaluator: ModelEvaluator,
    bars: ProgressBars,
    on_step: Callable[[], None],
) -> dict[str, Any] | None:
    """Evaluates the global model, or has clients evaluate their own; writes the pictures.

    Args:
        folder: of the cell.
        server: after a round.
        ask_clients: has clients evaluate their own models, which never reach the server.
        model_evaluator: of the cell.
        bars: show the progress.
        on_step: called after every denoising step of this process; it may end the cell by an error.

    Returns:
        The `fid` entry of `result.json`, without clients that did not answer; None where no client
        answered, or nothing is scored.

    Raises:
        Diverged: the images of a model are not finite.
    """
    config, evaluator = model_evaluator.config, model_evaluator.evaluator
    images = images_per_model(config)
    if not images:
        return None
    steps = sampling_steps(images, config.evaluation.steps)

    evaluations: dict[int | None, ModelEvaluation]
    if server.method.evaluate == "clients":
        clients = scored_clients(config, server.trained)
        if evaluator is None:
            clients = clients[:MAX_CLIENTS]
        evaluations = _evaluate_clients(clients, server, ask_clients, steps, bars)
        if not evaluations:
            print(f"fedlight: no client scored its model after round {server.round}", file=sys.stderr)
            return None
    else:
        advance = bars.sampling(steps)

        def step() -> None:
            on_step()
            advance(1)

        evaluations = {None: model_evaluator.evaluate(server.global_state(), server.round, None, step)}

    if config.evaluation.grid:
        draw_sample_grid(folder, server.round, config, model_evaluator.classes, evaluations)
    checks = [evaluation.memorisation for evaluation in evaluations.values() if evaluation.memorisation]
    memorisation = Memorisation.joined(checks) if checks else None
    if memorisation:
        path = folder / "memorisation.png"
        pictures.memorisation_histogram(path, memorisation.generated, memorisation.unseen, folder.name)

    if evaluator is None:
        return None
    downstream_all = evaluator.downstream.all() if evaluator.downstream else None
    trained = len(server.trained)
    return fid_entry(evaluations, memorisation, evaluator.extractor, config, trained, downstream_all)


def _evaluate_clients(
    clients: list[int], server: Server, ask_clients: AskClients, steps: int, bars: ProgressBars
) -> dict[int | None, ModelEvaluation]:
    """Asks clients to evaluate their own models; returns the answers in the order of `clients`.

    A client may fail to answer, as when an institution is offline.
    """
    advance = bars.sampling(len(clients) * steps)
    answers: dict[int, ModelEvaluation] = {}
    for scores in ask_clients(server.evaluations(clients, draw=True)):
        answers[scores.client] = ModelEvaluation.from_scores(scores)
        advance(steps)
    return {client: answers[client] for client in clients if client in answers}
