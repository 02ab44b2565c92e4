"""Makes the evaluator that the section `evaluation` of the configuration describes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlight.data.dataset import Dataset, Images
from fedlight.data.partition import Indices, count_labels
from fedlight.evaluation.downstream import check_downstream
from fedlight.evaluation.evaluation_config import EvaluationConfig
from fedlight.evaluation.evaluator import Evaluator
from fedlight.evaluation.extractor import (
    DIMENSIONS,
    Extractor,
    check_classifier,
    make_classifier,
    make_pretrained,
)
from fedlight.evaluation.memorisation import CopyCheck
from fedlight.evaluation.reference import make_reference
from fedlight.evaluation.scores import check_budget
from fedlight.evaluation.weights import find_weights

SIZED_BY_WEIGHTS = ("dinov2", "clip")
"""Extractors whose number of features the weights decide."""


def check_evaluation(config: EvaluationConfig, dataset: Dataset) -> None:
    """Checks what the scores need, before anything is made.

    Args:
        config: the section `evaluation`.
        dataset: with the training images of the cell.

    Raises:
        BadInput: the extractor does not fit the data, or there are too few images.
    """
    side = dataset.train.pixels.shape[-1]
    if config.weights is None or config.extractor not in SIZED_BY_WEIGHTS:
        _check_budget(config, dataset, DIMENSIONS[config.extractor])
    if config.extractor == "classifier":
        check_classifier(len(dataset.classes), side)
    if config.downstream:
        check_downstream(side)


def _check_budget(config: EvaluationConfig, dataset: Dataset, dimension: int) -> None:
    reference = dataset.train if config.reference == "train" else dataset.test
    check_budget(config.samples, len(reference), config.reference, config.extractor, dimension)


def make_evaluator(
    config: EvaluationConfig,
    data_name: str,
    complete: Dataset,
    dataset: Dataset,
    client_indices: Sequence[Indices],
    device: torch.device,
) -> Evaluator:
    """The evaluator of a cell's images: extractor and reference, from the cache or made now.

    Args:
        config: the section `evaluation`.
        data_name: name of the data set, for the classifier's file in the cache.
        complete: the complete data set, on which the classifier is trained.
        dataset: with the training images of the cell, which the generated ones are compared with.
        client_indices: the images of each client whose model is evaluated.
        device: of the extractor.

    Raises:
        BadInput: the extractor does not fit the data, its weights are missing, or there are too few images.
    """
    check_evaluation(config, dataset)
    splits = {"train": dataset.train, "test": dataset.test}
    extractor = make_extractor(config, data_name, complete, device)
    _check_budget(config, dataset, extractor.dimension)
    seen_classes = count_labels(dataset.train.labels, list(client_indices), len(dataset.classes)) > 0
    references = {
        split: make_reference(images.pixels, extractor, config.cache)
        for split, images in splits.items()
        if split == config.reference or config.memorisation
    }
    copies = None
    if config.memorisation:
        copies = CopyCheck(references["train"].features.values, references["test"].features.values)
    labels = torch.from_numpy(splits[config.reference].labels)
    reference = references[config.reference]
    return Evaluator(extractor, reference, labels, seen_classes, copies, config.bootstrap)


def make_extractor(
    config: EvaluationConfig, data_name: str, complete: Dataset, device: torch.device
) -> Extractor:
    """The feature extractor that `evaluation.extractor` names."""
    if config.extractor != "classifier":
        weights = find_weights(config.extractor, config.weights, config.cache)
        return make_pretrained(config.extractor, weights, device)
    train, test = _labelled(complete.train), _labelled(complete.test)
    return make_classifier(data_name, train, test, len(complete.classes), config.cache, device)


def _labelled(images: Images) -> tuple[Tensor, Tensor]:
    return images.pixels, torch.from_numpy(images.labels)
