"""The evaluation of a model: images are drawn from it and scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.diffusion.ddpm import DDPM
from fedlight.evaluation.evaluator import Evaluator
from fedlight.experiment.drawing import (
    cycle_labels,
    draw_images,
    draw_images_together,
    grid_images,
    images_per_model,
)
from fedlight.experiment.model_evaluation import ModelEvaluation
from fedlight.federation.messages import State
from fedlight.finetuning.latents import LatentSpace
from fedlight.runtime.seeds import derive_seed
from fedlight.runtime.stopwatch import Stopwatch


@dataclass(frozen=True)
class ModelEvaluator:
    """Draws images from the models of a cell and scores them.

    Attributes:
        config: of the cell.
        module: the model whose weights each evaluation replaces; it is left on the CPU.
        device: to draw images on.
        evaluator: scores images; None where `evaluation.samples` is 0.
        classes: the class names of the data set.
        max_workers: batches of the global model that are denoised at once.
        drawing: measures the time in which images are drawn.
        latents: where the model denoises; None for images.
    """

    config: CellConfig
    module: DDPM
    device: torch.device
    evaluator: Evaluator | None
    classes: Sequence[str]
    max_workers: int
    drawing: Stopwatch
    latents: LatentSpace | None = None

    def evaluate(
        self, state: State, round_: int, client: int | None, on_step: Callable[[], None]
    ) -> ModelEvaluation:
        """Evaluates one model; its images depend on the cell's seed, the round and the client alone.

        Args:
            state: its state_dict.
            round_: the round after which it is evaluated.
            client: whose own model it is; None for the global one.
            on_step: called after every denoising step.

        Raises:
            Diverged: the images are not finite.
        """
        config, images = self.config, images_per_model(self.config)
        labels = cycle_labels(config, images, len(self.classes))
        model = "the global model" if client is None else f"the model of client {client}"
        # Clients are evaluated side by side in processes already; a compiled UNet runs in one thread.
        workers = 1 if config.trainer.compile or client is not None else self.max_workers
        with self.drawing:
            drawn = draw_images(
                self.module,
                self.device,
                state,
                config,
                images,
                derive_seed(config.seed, "sample", round_, client or 0),
                labels,
                f"{model} after round {round_}",
                workers,
                on_step,
                latents=self.latents,
            )
        return self._score(drawn, client, labels)

    def evaluate_clients(
        self, states: Sequence[State], round_: int, clients: Sequence[int], on_step: Callable[[], None]
    ) -> list[tuple[dict[str, float], dict[str, State]]]:
        """Evaluates the models of clients, several of which draw their images in one computation.

        Returns:
            For each client the metrics, and the tensors as a message carries them.
        """
        if len(clients) == 1:
            evaluations = [self.evaluate(states[0], round_, clients[0], on_step)]
        else:
            config, images = self.config, images_per_model(self.config)
            labels = cycle_labels(config, images, len(self.classes))
            with self.drawing:
                drawn = draw_images_together(
                    self.module,
                    self.device,
                    states,
                    config,
                    images,
                    [derive_seed(config.seed, "sample", round_, client) for client in clients],
                    labels,
                    [f"the model of client {client} after round {round_}" for client in clients],
                    on_step,
                    self.latents,
                )
            pairs = zip(drawn, clients, strict=True)
            evaluations = [self._score(own, client, labels) for own, client in pairs]
        return [(evaluation.metrics, evaluation.to_groups()) for evaluation in evaluations]

    def _score(self, drawn: Tensor, client: int | None, labels: Tensor | None) -> ModelEvaluation:
        """Scores the images of a model, and takes some of them for the grid."""
        grid = drawn[: grid_images(self.config)].clone()
        if self.evaluator is None:
            return ModelEvaluation(grid, {}, None)
        samples = self.config.evaluation.samples
        scored_labels = None if labels is None else labels[:samples]
        return ModelEvaluation(grid, *self.evaluator(drawn[:samples], client, scored_labels))
