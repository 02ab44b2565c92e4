"""`fedlight.runtime.vmap`: under autocast, operations have the format that they have without vmap."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fedlight
from fedlight.runtime.vmap import vmap

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]

OPERATIONS: dict[str, Operation] = {
    "conv1d": lambda x, w, b: F.conv1d(x.flatten(2), w.flatten(2), b),
    "conv2d": lambda x, w, b: F.conv2d(x, w, b, padding=1),
    "conv3d": lambda x, w, b: F.conv3d(x[:, :, None], w[:, :, None], b),
    "conv_transpose2d": F.conv_transpose2d,
    "linear": lambda x, w, b: F.linear(x.mT @ x, w[:, :, 0, 0].mT.repeat(1, 2), b),
    "group_norm": lambda x, w, b: F.group_norm(x, 2, b, b),
    "attention": lambda x, w, b: F.scaled_dot_product_attention(x, x, x),
    "matmul": lambda x, w, b: x @ x.mT,
    "layer_norm": lambda x, w, b: F.layer_norm(x, (8,)),
    "mse_loss": lambda x, w, b: F.mse_loss(x, x * 2),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_formats_are_those_without_vmap(operation: Operation, dtype: torch.dtype, autocast: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=random) for shape in ((3, 2, 4, 8, 8), (3, 4, 4, 3, 3), (3, 4)))
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), sdpa_kernel(SDPBackend.MATH):
        alone = [operation(*one) for one in zip(x, w, b, strict=True)]
        together = vmap(operation)(x, w, b)
    assert together.dtype == alone[0].dtype
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(together, torch.stack(alone), rtol=tolerance, atol=tolerance)


def test_nothing_else_uses_the_vmap_of_torch() -> None:
    package = Path(fedlight.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                assert "vmap" not in {alias.name for alias in node.names}, path
