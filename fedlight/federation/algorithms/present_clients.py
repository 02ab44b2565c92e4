"""Tensors that a callback keeps of several clients that train in one computation, and some of which left."""

from torch import Tensor


def of_present_clients(kept: Tensor, parameter: Tensor) -> Tensor:
    """The part of a kept tensor that belongs to the clients in the parameter; all of one client's tensor.

    Args:
        kept: like the parameter was when all clients were in it.
        parameter: whose first dimension are the clients, where several train in one computation.
    """
    return kept[: len(parameter)] if parameter.dim() else kept
