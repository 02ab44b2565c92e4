"""The class names of the published data sets, available without their images."""

from collections.abc import Mapping
from typing import Any

from fedlight.data import celeba, fmnist

DIGITS = tuple(str(digit) for digit in range(10))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def published_classes(source: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The name of each label, as the loader of a published data set gives it; None for any other data set.

    Args:
        source: `data.source` of a configuration.
    """
    loader = str(source["_target_"]).removeprefix("fedlight.data.").removesuffix(".load")
    if loader == "celeba":
        return celeba.class_names(source["attributes"])
    return {"digits": DIGITS, "fmnist": fmnist.CLASSES, "cifar10": CIFAR10}.get(loader)
