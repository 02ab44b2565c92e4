"""Makes the algorithm and the codec that the configuration names."""

from collections.abc import Collection

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.codec import Codec
from fedlight.federation.federation_config import ExtensionConfig, TransformConfig
from fedlight.federation.method import Method
from fedlight.runtime.errors import BadInput
from fedlight.runtime.extension import make_extension


def make_algorithm(config: ExtensionConfig | None) -> FedAvg:
    """The algorithm that the section `algorithm` names; FedAvg without one."""
    if config is None:
        return FedAvg()
    algorithm = make_extension("algorithm", config.model_dump(by_alias=True))
    if not isinstance(algorithm, FedAvg):
        raise BadInput(f"algorithm must be a subclass of FedAvg, got {type(algorithm).__name__}")
    return algorithm


def make_codec(
    config: TransformConfig | None, method: Method, buffers: Collection[str], first_known: bool = False
) -> Codec:
    """The codec of the slices; without a transform, and for CENTRAL, values are sent uncompressed.

    Args:
        config: the section `transform`.
        method: resolved over the slices.
        buffers: names of tensors that are always sent uncompressed.
        first_known: clients have the first model, which is therefore not sent.

    Raises:
        BadInput: a client would report the delta of a slice that it does not receive.
    """
    if config is None or method.pool:
        return Codec(seeded_start=first_known)
    if missing := [slice_ for slice_ in method.uplink if slice_ not in method.downlink]:
        raise BadInput(
            f"transform={config.name} encodes differences to what a client received, and method "
            f"{method.name} does not send {', '.join(missing)} down"
        )
    up, down = (
        [make_extension("transform", stage) for stage in stages] for stages in (config.up, config.down)
    )
    return Codec(up, down, config.seeded_start or first_known, buffers)
