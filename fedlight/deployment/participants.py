"""The cell of each participant in a deployment: of the server, and of an institution."""

from fedlight.config import CellConfig
from fedlight.data.dataset import Dataset
from fedlight.data.loading import load
from fedlight.data.partition import assign_all_to
from fedlight.data.placeholder import no_images
from fedlight.deployment.deployable import agreed_classes
from fedlight.experiment.parts import CellParts
from fedlight.experiment.setup import set_up
from fedlight.runtime.errors import BadInput


def set_up_server(config: CellConfig) -> CellParts:
    """The parts of the server's cell: with images of its own to score with, or without any image.

    Raises:
        BadInput: scores are configured, and there are no images to compare with.
    """
    data = config.data
    if "root" not in data.source or data.root:
        return set_up(config, _load(config))
    if config.evaluation.samples:
        raise BadInput(
            f"evaluation.samples={config.evaluation.samples} needs images to compare with: start with "
            "data-root=FOLDER, or set it to 0"
        )
    dataset = no_images(data.image_size, data.channels, agreed_classes(config) or ["unknown"])
    return set_up(config, dataset, assign_all_to(dataset.train.labels, config.clients, None))


def set_up_institution(config: CellConfig, client: int) -> CellParts:
    """The parts of an institution's cell: all images of its folder belong to its client.

    Without a folder of its own it takes the client's images of a public data set, partitioned as in a
    simulation.

    Raises:
        BadInput: the configuration has no client of this number.
    """
    if not 0 <= client < config.clients:
        raise BadInput(f"clients are 0 to {config.clients - 1}, got client={client}")
    dataset = _load(config)
    if not config.data.root:
        return set_up(config, dataset)
    training = dataset.train.first(config.data.limit)
    return set_up(config, dataset, assign_all_to(training.labels, config.clients, client))


def _load(config: CellConfig) -> Dataset:
    """The images of this machine, with the class numbers that all participants share."""
    dataset, classes = load(config.data), agreed_classes(config)
    return dataset.numbered_by(classes) if classes else dataset
