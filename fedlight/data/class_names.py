"""The classes of the published data sets, known without their images."""

from collections.abc import Mapping
from typing import Any

from fedlight.data import celeba, fmnist

DIGITS = tuple(str(digit) for digit in range(10))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def published_classes(source: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The name of each label, as the reader of a data set gives them; None for a set of one's own.

    Args:
        source: `data.source` of a configuration.
    """
    reader = str(source["_target_"]).removeprefix("fedlight.data.").removesuffix(".load")
    if reader == "celeba":
        return celeba.class_names(source["attributes"])
    return {"digits": DIGITS, "fmnist": fmnist.CLASSES, "cifar10": CIFAR10}.get(reader)
