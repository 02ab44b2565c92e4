"""The evaluation of a model: images are drawn from it and scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedlight.config import CellConfig
from fedlight.diffusion.ddpm import DDPM
from fedlight.evaluation.evaluator import Evaluator
from fedlight.experiment.drawing import cycle_labels, draw_images, grid_images, images_per_model
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
        grid = drawn[: grid_images(config)].clone()
        if self.evaluator is None:
            return ModelEvaluation(grid, {}, None)
        samples = config.evaluation.samples
        scored_labels = None if labels is None else labels[:samples]
        return ModelEvaluation(grid, *self.evaluator(drawn[:samples], client, scored_labels))

    def evaluate_client(
        self, state: State, round_: int, client: int, on_step: Callable[[], None]
    ) -> tuple[dict[str, float], dict[str, State]]:
        """Evaluates a client's own model; returns the metrics, and the tensors as a message carries them."""
        evaluation = self.evaluate(state, round_, client, on_step)
        return evaluation.metrics, evaluation.to_groups()
