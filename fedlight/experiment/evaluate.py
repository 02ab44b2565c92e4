"""The models of a cell after a round: drawn from, pictured and scored."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.sampling import sample, sampling_steps
from fedlight.evaluation.evaluator import Verdict
from fedlight.evaluation.memorisation import Memorisation
from fedlight.experiment.build import Parts, image_shape
from fedlight.federation.federator import Federator
from fedlight.federation.store import State
from fedlight.loggers import pictures
from fedlight.loggers.progress import ProgressBars
from fedlight.runtime.seeds import derive_seed, stream

GRID_CLIENTS = 10  # rows of a sample grid where clients are judged


@dataclass(frozen=True)
class Score:
    """What a round's models came to.

    Attributes:
        fid: the entry of `result.json`, or None where nothing was scored.
        memorisation: of all generated images, where it was checked.
    """

    fid: dict[str, Any] | None
    memorisation: Memorisation | None


def is_due(round_: int, settings: CellConfig) -> bool:
    """Whether the models are scored after this round: the last one, and every `evaluation.every`-th."""
    every = settings.evaluation.every
    return round_ == settings.rounds or (every is not None and round_ % every == 0)


def grid_path(folder: Path, round_: int) -> Path:
    """Where the sample grid of a round is kept in a cell's folder."""
    return folder / "samples" / f"round_{round_:03d}.png"


def score_models(
    folder: Path,
    round_: int,
    federator: Federator,
    parts: Parts,
    settings: CellConfig,
    bars: ProgressBars,
    on_step: Callable[[], None],
) -> Score:
    """Draws images from the global model or from each client's own, pictures and scores them.

    A model's images depend on the cell's seed, the round and the client, and on nothing else. `on_step` is
    called after every denoising step, and may end the cell.
    """
    asked = settings.evaluation
    per_client = federator.method.evaluate == "clients"
    shown = min(asked.grid, pictures.COLUMNS) if per_client else asked.grid
    images = max(asked.samples, shown)
    if not images:
        return Score(None, None)
    models: list[int | None] = list(scored_clients(settings)) if per_client else [None]
    if parts.judge is None:
        models = models[:GRID_CLIENTS]

    advance = bars.sampling(len(models) * sampling_steps(images, asked.steps))

    def step() -> None:
        on_step()
        advance()

    grids: list[Tensor] = []
    verdicts: list[Future[Verdict]] = []
    with ThreadPoolExecutor(1, "judge", torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        for client in models:  # while one model's images are judged, the next one's are drawn
            state = federator.global_state() if client is None else federator.client_state(client)
            seed = derive_seed(settings.seed, "sample", round_, client or 0)
            drawn = draw(parts.module, parts.device, state, settings, images, seed, step)
            if parts.judge is not None:
                verdicts.append(pool.submit(parts.judge, drawn[: asked.samples]))
            if len(grids) < GRID_CLIENTS:
                grids.append(drawn[:shown])
        found = [verdict.result() for verdict in verdicts]
    scores = [score for score, _ in found]
    checks = [checked for _, checked in found if checked is not None]

    if shown:
        rows = [
            ("\n".join(_label(client, score)), grid)
            for client, score, grid in zip_longest(models[: len(grids)], scores[: len(grids)], grids)
        ]
        title = f"{settings.method.name}, {settings.clients} clients, after round {round_}"
        pictures.sample_grid(grid_path(folder, round_), rows, title)
    check = Memorisation.joined(checks) if checks else None
    return Score(_entry(scores, models, check, parts, settings) if scores else None, check)


def _label(client: int | None, score: dict[str, float] | None) -> list[str]:
    """The lines beside a row of the sample grid."""
    whose = [] if client is None else [f"client {client}"]
    return whose if score is None else [*whose, f"FID {score['fid']:.1f}"]


def draw(
    module: DDPM,
    device: torch.device,
    state: State,
    settings: CellConfig,
    images: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Images of the model with the given state_dict, uint8, shape (images, channels, height, width)."""
    module.to(device).load_state_dict(state)
    drawn = sample(
        module.denoiser,
        module.schedule,
        (images, *image_shape(settings)),
        sampler=settings.evaluation.sampler,
        steps=settings.evaluation.steps,
        seed=seed,
        on_step=on_step,
    )
    module.cpu()
    return drawn


def scored_clients(settings: CellConfig) -> list[int]:
    """The clients whose models are judged: all, or `evaluation.clients` of them, the same in every round."""
    wanted, clients = settings.evaluation.clients, settings.clients
    if wanted == "all" or wanted >= clients:
        return list(range(clients))
    chosen = stream(settings.seed, "evaluation").choice(clients, wanted, replace=False)
    return sorted(chosen.tolist())


def _entry(
    scores: list[dict[str, float]],
    models: list[int | None],
    check: Memorisation | None,
    parts: Parts,
    settings: CellConfig,
) -> dict[str, Any]:
    """The `fid` entry of `result.json`; every metric but `per_client` is a mean over the models."""
    assert parts.judge is not None
    extractor, asked = parts.judge.extractor, settings.evaluation
    fids = [found["fid"] for found in scores]
    clients = [client for client in models if client is not None]
    further = {name: float(np.mean([found[name] for found in scores])) for name in scores[0] if name != "fid"}
    return {
        "extractor": extractor.name,
        "scope": "clients" if clients else "global",
        "value": float(np.mean(fids)),
        "std": float(np.std(fids, ddof=1)) if len(fids) > 1 else None,
        "per_client": fids if clients else None,
        "clients": clients or None,
        "extractor_accuracy": extractor.accuracy,
        "extractor_sha256": extractor.sha256,
        "samples": asked.samples,
        "sampler": asked.sampler,
        "steps": asked.steps,
        "reference": asked.reference,
        **further,
        "memorisation": check.summary() if check else None,
    }
