"""The models of a cell after a round: images are drawn from them, pictured and scored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.sampling import sample, sampling_steps
from fedlight.evaluation.extractor import Extractor
from fedlight.evaluation.memorisation import Memorisation
from fedlight.federation.messages import Scores, State
from fedlight.federation.server import Server
from fedlight.federation.transport.transport import Transport
from fedlight.loggers import pictures
from fedlight.loggers.bars import ProgressBars
from fedlight.runtime.errors import Damaged
from fedlight.runtime.seeds import derive_seed, stream

if TYPE_CHECKING:
    from fedlight.experiment.parts import CellParts

METRICS = ("kid", "precision", "recall", "inception_score")  # beside FID, of every extractor
GROUPS = {"coverage": ("share", "entropy"), "label_accuracy": ("all", "held", "unseen")}  # of the classifier
GRID_CLIENTS = 10  # rows of a sample grid where every client's own model is evaluated


@dataclass(frozen=True)
class Drawn:
    """What was drawn from one model.

    Attributes:
        grid: the images to show, uint8, shape (n, channels, height, width).
        metrics: name: value; empty where nothing is scored.
        memorisation: where it was checked.
    """

    grid: Tensor
    metrics: dict[str, float]
    memorisation: Memorisation | None

    def to_groups(self) -> dict[str, State]:
        """The tensors as a message carries them."""
        groups = {"grid": {"images": self.grid}}
        if self.memorisation:
            ratios = self.memorisation._asdict()
            groups["memorisation"] = {name: torch.from_numpy(found) for name, found in ratios.items()}
        return groups

    @classmethod
    def from_groups(cls, metrics: dict[str, float], groups: dict[str, State]) -> Drawn:
        """The inverse of `to_groups`."""
        ratios = {name: found.numpy() for name, found in groups.get("memorisation", {}).items()}
        return cls(groups["grid"]["images"], metrics, Memorisation(**ratios) if ratios else None)


def is_due(round_: int, config: CellConfig) -> bool:
    """Whether the models are evaluated after this round: the last one, and every `evaluation.every`-th."""
    every = config.evaluation.every
    return round_ == config.rounds or (every is not None and round_ % every == 0)


def grid_path(folder: Path, round_: int) -> Path:
    """Where the sample grid of a round is kept in a cell's folder."""
    return folder / "samples" / f"round_{round_:03d}.png"


def evaluate_models(
    folder: Path,
    server: Server,
    transport: Transport,
    components: CellParts,
    bars: ProgressBars,
    on_step: Callable[[], None],
) -> dict[str, Any] | None:
    """Draws images from the global model or asks clients to draw from their own; pictures and scores them.

    A model's images depend on the cell's seed, the round and the client, and on nothing else.

    Args:
        folder: of the cell.
        server: after a round.
        transport: to the clients, whose own models never reach the server.
        components: of the cell.
        bars: shows how far it is.
        on_step: called after every denoising step of this process, and may end the cell.

    Returns:
        The `fid` entry of `result.json`, or None where nothing is scored. A client that did not answer counts
        nowhere.
    """
    config, per_client = components.config, server.method.evaluate == "clients"
    images = _images(config)
    if not images:
        return None
    models: list[int | None] = list(scored_clients(config, server.trained)) if per_client else [None]
    if components.evaluator is None:
        models = models[:GRID_CLIENTS]
    steps = sampling_steps(images, config.evaluation.steps)
    advance = bars.sampling(len(models) * steps)

    def step() -> None:
        on_step()
        advance(1)

    drawn: list[Drawn] = []
    if per_client:
        clients = [client for client in models if client is not None]
        answers: dict[int | None, Drawn] = {}
        for scores in transport.evaluate(server.evaluations(clients, draw=True)):
            groups = {name: payload.tensors for name, payload in scores.payloads.items()}
            answers[scores.client] = Drawn.from_groups(scores.metrics, groups)
            advance(steps)
        models = [client for client in models if client in answers]  # an institution may not answer
        if not models:
            print(f"fedlight: no client scored its model after round {server.round}", file=sys.stderr)
            return None
        drawn = [answers[client] for client in models]
    else:
        drawn.append(draw_and_score(components, server.global_state(), server.round, None, step))

    metrics = [model.metrics for model in drawn if model.metrics]
    if drawn[0].grid.numel():
        heads = _heads(config, components.dataset.classes)
        a_row = len(heads) if heads and per_client else None
        shown = [model.grid[:a_row] for model in drawn[:GRID_CLIENTS]]
        labels = zip_longest(models[: len(shown)], metrics[: len(shown)])
        rows = [("\n".join(_label(*label)), grid) for label, grid in zip(labels, shown, strict=True)]
        title = f"{config.method.name}, {config.clients} clients, after round {server.round}"
        if heads:
            title += "; columns: the class that was asked for"
        pictures.sample_grid(grid_path(folder, server.round), rows, title, heads)
    checks = [model.memorisation for model in drawn if model.memorisation]
    check = Memorisation.joined(checks) if checks else None
    if check:
        pictures.memorisation_histogram(
            folder / "memorisation.png", check.generated, check.unseen, folder.name
        )
    if components.evaluator is None:
        return None
    return _entry(metrics, models, check, components.evaluator.extractor, config, len(server.trained))


def check_drawn(scores: Scores, config: CellConfig) -> None:
    """Checks scores and images from a client that nobody can vouch for.

    Args:
        scores: the answer to a request to draw, with finite numbers.
        config: of the cell.

    Raises:
        Damaged: the cell's evaluation gives other metrics, or tensors of other names, shapes and dtypes.
    """
    asked = config.evaluation
    required = {"fid", *METRICS} if asked.samples else set()
    known = {"own_fid", *(f"{group}.{name}" for group, names in GROUPS.items() for name in names)}
    if missing := required - scores.metrics.keys():
        raise Damaged(f"has no {min(missing)}")
    if odd := scores.metrics.keys() - (required | known if required else required):
        raise Damaged(f"has a metric {min(odd)}")
    shapes: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...] | None]]] = {
        "grid": {"images": (torch.uint8, (_shown(config), *config.data.shape))}
    }
    if asked.samples and asked.memorisation:
        shapes["memorisation"] = {
            "generated": (torch.float64, (asked.samples,)),
            "unseen": (torch.float64, None),
            "duplicates": (torch.int64, (3,)),
        }
    if scores.payloads.keys() != shapes.keys():
        raise Damaged(f"shows {', '.join(sorted(scores.payloads)) or 'nothing'}")
    for group, wanted in shapes.items():
        tensors = scores.payloads[group].tensors
        if tensors.keys() != wanted.keys():
            raise Damaged(f"shows {', '.join(sorted(tensors)) or 'nothing'} as its {group}")
        for name, (dtype, shape) in wanted.items():
            tensor = tensors[name]
            fits = tensor.dim() == 1 and len(tensor) > 0 if shape is None else tensor.shape == shape
            if tensor.dtype is not dtype or not fits or (tensor < 0).any():
                raise Damaged(f"has {name} of {tensor.dtype} and shape {tuple(tensor.shape)} in its {group}")


def draw_and_score(
    components: CellParts, state: State, round_: int, client: int | None, on_step: Callable[[], None]
) -> Drawn:
    """Draws images from one model and scores them; `client` is None for the global one."""
    config = components.config
    seed = derive_seed(config.seed, "sample", round_, client or 0)
    labels = even_labels(config, _images(config), len(components.dataset.classes))
    workers = (
        1 if config.trainer.compile or client is not None else components.max_workers
    )  # clients: processes
    model = "the global model" if client is None else f"the model of client {client}"
    images = draw(
        components.model,
        components.device,
        state,
        config,
        _images(config),
        seed,
        labels,
        f"{model} after round {round_}",
        workers,
        on_step,
    )
    grid = images[: _shown(config)].clone()
    if components.evaluator is None:
        return Drawn(grid, {}, None)
    scored = config.evaluation.samples
    return Drawn(
        grid, *components.evaluator(images[:scored], client, labels if labels is None else labels[:scored])
    )


def _shown(config: CellConfig) -> int:
    """Images of a model in the sample grid."""
    grid = config.evaluation.grid
    return min(grid, pictures.COLUMNS) if config.method.evaluate == "clients" else grid


def _heads(config: CellConfig, classes: Sequence[str]) -> Sequence[str]:
    """Of the columns of a conditional model's grid, which is asked for each class in turn."""
    return classes if config.model.conditional and len(classes) <= pictures.COLUMNS else ()


def _images(config: CellConfig) -> int:
    """Images to draw from a model."""
    return max(config.evaluation.samples, _shown(config))


def _label(client: int | None, metrics: dict[str, float] | None) -> list[str]:
    """The lines beside a row of the sample grid."""
    whose = [] if client is None else [f"client {client}"]
    return whose if metrics is None else [*whose, f"FID {metrics['fid']:.1f}"]


def draw(
    module: DDPM,
    device: torch.device,
    state: State,
    config: CellConfig,
    images: int,
    seed: int,
    labels: Tensor | None,
    model: str,
    workers: int = 1,
    on_step: Callable[[], None] = lambda: None,
    on_frame: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Images of the model with the given state_dict, uint8, shape (images, channels, height, width).

    `labels` are asked of a conditional model, int64, shape (images,); None of another. The images do not
    depend on `workers`, the threads that denoise a batch each.

    Raises:
        Diverged: the images are not finite; the message begins with `model`.
    """
    module.to(device).load_state_dict(state)
    drawn = sample(
        module.denoiser,
        module.schedule,
        (images, *config.data.shape),
        sampler=config.evaluation.sampler,
        steps=config.evaluation.steps,
        seed=seed,
        labels=labels,
        guidance=config.evaluation.guidance,
        workers=workers,
        on_step=on_step,
        on_frame=on_frame,
        model=model,
    )
    module.cpu()
    return drawn


def even_labels(config: CellConfig, images: int, classes: int) -> Tensor | None:
    """Labels to ask of a conditional model, 0, 1, ... and again, each as often; None of another model."""
    return torch.arange(images) % classes if config.model.conditional else None


def scored_clients(config: CellConfig, trained: Set[int]) -> list[int]:
    """The clients whose models are evaluated: `evaluation.clients` of those that have trained.

    They are the same in every round, where they have all trained before. Where nobody has, every client
    counts: all hold their first weights.
    """
    wanted, clients = config.evaluation.clients, config.clients
    number = clients if wanted == "all" else min(wanted, clients)
    draw = stream(config.seed, "evaluation")
    first = draw.choice(clients, number, replace=False).tolist()
    then = draw.permutation(sorted(set(range(clients)).difference(first))).tolist()
    return sorted([client for client in (*first, *then) if not trained or client in trained][:number])


def _entry(
    metrics: list[dict[str, float]],
    models: list[int | None],
    check: Memorisation | None,
    extractor: Extractor,
    config: CellConfig,
    trained: int,
) -> dict[str, Any]:
    """The `fid` entry of `result.json`: means over the models that have the metric, None without one."""
    asked = config.evaluation
    fids = [found["fid"] for found in metrics]
    clients = [client for client in models if client is not None]
    means = {
        name: float(np.mean([found[name] for found in metrics if name in found]))
        for name in dict.fromkeys(name for found in metrics for name in found)
    }
    grouped = {
        group: {name: means.get(f"{group}.{name}") for name in names}
        for group, names in GROUPS.items()
        if f"{group}.{names[0]}" in means
    }
    own = {"value": means.get("own_fid"), "per_client": [found.get("own_fid") for found in metrics]}
    return {
        "extractor": extractor.name,
        "scope": "clients" if clients else "global",
        "value": means["fid"],
        "std": float(np.std(fids, ddof=1)) if len(fids) > 1 else None,
        "per_client": fids if clients else None,
        "clients": clients or None,
        "trained_clients": trained if clients else None,
        "extractor_accuracy": extractor.accuracy,
        "extractor_sha256": extractor.sha256,
        "samples": asked.samples,
        "sampler": asked.sampler,
        "steps": asked.steps,
        "reference": asked.reference,
        **{name: means[name] for name in METRICS},
        **grouped,
        "own": own if clients else None,
        "memorisation": check.summary() if check else None,
    }
