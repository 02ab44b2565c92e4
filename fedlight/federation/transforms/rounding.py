"""Coarse rounding: most codes are zero, so that entropy coding is effective (EF-SGD, arXiv 1901.09847)."""

import numpy as np
import torch
from torch import Tensor

from fedlight.federation.messages import State
from fedlight.federation.packing import pack_bits, packed_size, unpack_bits
from fedlight.federation.transforms.channels import check_codes, check_scales
from fedlight.runtime.errors import BadInput

BITS = 4
LEVELS = 7  # on each side of zero


class Rounding:
    """Rounds each entry to the nearest multiple of a step, at most seven steps from zero; it is not random.

    The step is proportional to the tensor's root mean square, in bfloat16. Sends the packed codes of each
    tensor, four bits per entry, and its step. It is meant for chains that end in entropy coding. Since it is
    biased, it needs error feedback where the deltas of many clients are averaged.

    Args:
        step: in units of the root mean square, above 0.

    Raises:
        BadInput: `step` is not above 0.
    """

    def __init__(self, step: float) -> None:
        if not step > 0:
            raise BadInput(f"transform: the step of rounding must be above 0, got {step}")
        self.step = step

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        sent: State = {}
        for name, tensor in delta.items():
            values = tensor.float().flatten()
            step = (self.step * values.square().mean().sqrt().nan_to_num()).bfloat16()
            codes = (values / step.float()).nan_to_num().round().clamp(-LEVELS, LEVELS) + LEVELS
            sent[f"{name}.codes"] = pack_bits(codes.to(torch.uint8), BITS)
            sent[f"{name}.step"] = step
        return sent

    def decode(self, sent: State, like: State) -> State:
        return {name: _values(sent, name, tensor) for name, tensor in like.items()}

    def sent_like(self, like: State) -> State:
        sent: State = {}
        for name, tensor in like.items():
            sent[f"{name}.codes"] = torch.zeros(packed_size(tensor.numel(), BITS), dtype=torch.uint8)
            sent[f"{name}.step"] = torch.zeros((), dtype=torch.bfloat16)
        return sent


def _values(sent: State, name: str, like: Tensor) -> Tensor:
    codes = unpack_bits(sent[f"{name}.codes"], BITS, like.numel())
    check_codes(name, codes, 2 * LEVELS)
    step = check_scales(name, sent[f"{name}.step"])
    return ((codes.float() - LEVELS) * step).to(like.dtype).view(like.shape)
