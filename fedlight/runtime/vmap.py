"""`torch.func.vmap` with the number formats that autocast gives outside of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOWER_PRECISION = frozenset(
    {
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.linear,
        F.scaled_dot_product_attention,
    }
)
"""Operations that autocast computes in its format, and that vmap splits before autocast sees them."""

SAME_PRECISION = frozenset({F.group_norm, torch.group_norm})
"""Operations with the format of their input, which vmap gives that of their float32 weight."""


def vmap(function: Callable[..., Any], in_dims: Any = 0, randomness: str = "error") -> Callable[..., Any]:
    """`torch.func.vmap`; under autocast each operation has the format that it has outside of vmap.

    `torch.func.vmap` comes before autocast: a convolution in it is computed in float32, silently, and fails
    where its input already has the format of autocast. Here the inputs are cast first.

    Args:
        function, in_dims, randomness: as for `torch.func.vmap`.
    """

    def cast_and_call(*inputs: Any) -> Any:
        if not any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
            return function(*inputs)
        with _Autocast():
            return function(*inputs)

    return torch.func.vmap(cast_and_call, in_dims=in_dims, randomness=randomness)


class _Autocast(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in LOWER_PRECISION:
            args = tuple(map(_cast, args))
            kwargs = {name: _cast(value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        return result.to(args[0].dtype) if func in SAME_PRECISION else result


def _cast(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    device = value.device.type
    return value.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else value
