"""The exponential moving average of the global model over rounds."""

import torch

from fedlight.federation.messages import State


def update_average(average: State, theta: State, decay: float) -> State:
    """average <- decay average + (1 - decay) theta; the first round's theta begins it.

    Args:
        average: after the round before; empty before the first.
        theta: the global model after this round; its integers are copied, not averaged.
        decay: of a round, in [0, 1).
    """
    return {
        name: torch.lerp(average[name], tensor, 1 - decay)
        if name in average and tensor.is_floating_point()
        else tensor
        for name, tensor in theta.items()
    }
