"""Loads the data set that the section `data` of the configuration names."""

import sys
from typing import Any

from fedlight.data.data_config import DataConfig
from fedlight.data.dataset import Dataset
from fedlight.runtime.errors import BadInput
from fedlight.runtime.extension import make_extension

HUGGING_FACE = ("path", "subset", "split", "image_column", "label_column", "client_column")


def load(config: DataConfig) -> Dataset:
    """The complete data set, regardless of `data.limit`, numbered by `data.classes` or `data.only`.

    Raises:
        BadInput: it cannot be loaded, or its images do not have the shape that the configuration states.
    """
    options: dict[str, Any] = {"skip_unreadable": True} if config.skip_unreadable else {}
    if config.range != "type":
        options["range"] = config.range
    if config.path is not None:
        options |= {key: getattr(config, key) for key in HUGGING_FACE}
    dataset = make_extension("data", config.source, **options)
    if not isinstance(dataset, Dataset):
        raise BadInput(
            f"data {config.source['_target_']} must return a Dataset, got {type(dataset).__name__}"
        )
    if (shape := tuple(dataset.train.pixels.shape[1:])) != config.shape:
        raise BadInput(
            f"data.channels and data.image_size say {config.shape}, but {config.name} holds images of "
            f"{shape} (channels, height, width)"
        )
    if config.classes:
        dataset = dataset.numbered_by(config.classes)
    return dataset.select_classes(config.only) if config.only else dataset


def print_notes(dataset: Dataset) -> None:
    """Prints the notes of a data set on stderr, a line each."""
    for note in dataset.notes:
        print(f"fedlight: {note}", file=sys.stderr)
