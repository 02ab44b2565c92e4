"""Builds the cell of each participant in a deployment: of the server, and of an institution."""

from fedlight.config import CellConfig, PartitionConfig
from fedlight.deployment.deployable import with_classes
from fedlight.experiment.setup import Components, build
from fedlight.runtime.errors import BadInput


def build_server(config: CellConfig) -> Components:
    """Builds the server's cell: with images of its own to score with, or without any image.

    Raises:
        BadInput: scores are configured, and there are no images to compare with.
    """
    config = with_classes(config)
    if "root" not in config.data.source or config.data.root:
        return build(config)
    if config.evaluation.samples:
        raise BadInput(
            f"evaluation.samples={config.evaluation.samples} needs images to compare with: start with "
            "data-root=FOLDER, or set it to 0"
        )
    source = {
        "_target_": "fedlight.data.elsewhere.load",
        "image_size": config.data.image_size,
        "channels": config.data.channels,
        "classes": config.data.classes or ["unknown"],
    }
    data = config.data.model_copy(update={"source": source, "limit": None})
    return build(config.model_copy(update={"data": data, "partition": _local(config.partition, None)}))


def build_institution(config: CellConfig, client: int) -> Components:
    """Builds an institution's cell: all images of its folder belong to its client.

    Without a folder of its own it takes the client's share of a public data set, partitioned as in a
    simulation.

    Raises:
        BadInput: the configuration has no client of this number.
    """
    if not 0 <= client < config.clients:
        raise BadInput(f"clients are 0 to {config.clients - 1}, got client={client}")
    config = with_classes(config)
    if config.data.root:
        config = config.model_copy(update={"partition": _local(config.partition, client)})
    return build(config)


def _local(partition: PartitionConfig, client: int | None) -> PartitionConfig:
    """The partition that assigns all images of this place to one client, or to none."""
    target = {"_target_": "fedlight.data.partition.own", "client": client}
    return partition.model_copy(update={"deal": target})
