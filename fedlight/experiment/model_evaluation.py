"""The evaluation of one model, as a client sends it to the server, and the check of an untrusted one."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.evaluation.memorisation import Memorisation
from fedlight.evaluation.scores import metric_names
from fedlight.experiment.drawing import grid_images
from fedlight.federation.messages import Scores, State
from fedlight.runtime.errors import Damaged

DOWNSTREAM = "downstream_accuracy"
GROUPS = {
    "coverage": ("share", "entropy"),
    "label_accuracy": ("all", "held", "unseen"),
    DOWNSTREAM: ("generated", "own"),
}
"""Metrics that a model may have: one is named `coverage.share`, and so on."""


@dataclass(frozen=True)
class ModelEvaluation:
    """Images of one model and their scores.

    Attributes:
        grid: the images of the sample grid, uint8, shape (n, channels, height, width).
        metrics: metric name -> value; empty where `evaluation.samples` is 0.
        memorisation: the memorisation check; None where `evaluation.memorisation` is off.
    """

    grid: Tensor
    metrics: dict[str, float]
    memorisation: Memorisation | None

    def to_groups(self) -> dict[str, State]:
        """The tensors, grouped as a message carries them."""
        groups = {"grid": {"images": self.grid}}
        if self.memorisation:
            arrays = self.memorisation._asdict()
            groups["memorisation"] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return groups

    @classmethod
    def from_scores(cls, scores: Scores) -> "ModelEvaluation":
        """The evaluation that a client's message carries."""
        groups = {name: payload.tensors for name, payload in scores.payloads.items()}
        arrays = {name: tensor.numpy() for name, tensor in groups.get("memorisation", {}).items()}
        return cls(groups["grid"]["images"], scores.metrics, Memorisation(**arrays) if arrays else None)


def check_scores(scores: Scores, config: CellConfig) -> None:
    """Validates the scores and images of one untrusted client.

    Args:
        scores: the client's answer to a request to draw images; its numbers are finite.
        config: of the cell.

    Raises:
        Damaged: a metric is missing or unknown, or a tensor is missing, unknown, negative, or of another
            shape or dtype than the cell's evaluation makes.
    """
    evaluation = config.evaluation
    required = {"fid", *metric_names(evaluation.extractor)} if evaluation.samples else set()
    if evaluation.samples and evaluation.bootstrap:
        required |= {"fid_standard_error"}
    groups = {group: names for group, names in GROUPS.items() if group != DOWNSTREAM or evaluation.downstream}
    optional = {"own_fid", *(f"{group}.{name}" for group, names in groups.items() for name in names)}
    known = required | optional if required else set()
    if missing := required - scores.metrics.keys():
        raise Damaged(f"lacks the metric {min(missing)}")
    if unknown := scores.metrics.keys() - known:
        raise Damaged(f"has the metric {min(unknown)}, which this cell does not compute")

    expected: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...] | None]]] = {
        "grid": {"images": (torch.uint8, (grid_images(config), *config.data.shape))}
    }
    if evaluation.samples and evaluation.memorisation:
        expected["memorisation"] = {
            "generated": (torch.float64, (evaluation.samples,)),
            "unseen": (torch.float64, None),  # any length but 0: a client need not know it
            "duplicates": (torch.int64, (3,)),
        }
    if scores.payloads.keys() != expected.keys():
        raise Damaged(f"carries {_listed(scores.payloads)}, expected {_listed(expected)}")
    for group, specs in expected.items():
        tensors = scores.payloads[group].tensors
        if tensors.keys() != specs.keys():
            raise Damaged(f"carries {_listed(tensors)} in {group}, expected {_listed(specs)}")
        for name, (dtype, shape) in specs.items():
            tensor = tensors[name]
            fits = tensor.dim() == 1 and len(tensor) > 0 if shape is None else tensor.shape == shape
            if tensor.dtype is not dtype or not fits:
                raise Damaged(
                    f"has {group}.{name} of {tensor.dtype} and shape {tuple(tensor.shape)}, expected {dtype} "
                    f"and shape {shape or '(n,), n > 0'}"
                )
            if (tensor < 0).any():
                raise Damaged(f"has negative numbers in {group}.{name}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no tensors"
