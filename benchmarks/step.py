"""The training step of the paper's UNet against a plain implementation, and against the machine's limits.

python benchmarks/step.py [--batch 128] [--device cuda] [--quick] [--out FILE.json]

A step is forward, backward and Adam. The plain implementation is the same network with the same weights:
eager, fp32, images as (n, c, h, w) in memory, attention by einsum, torch's own depthwise gradient, unfused
Adam. The limits are measured here: the step's floating-point operations over the speed of a large matrix
product, and its bytes over the speed of a large copy, where every operation reads its inputs and writes its
outputs once.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from common import composed, in_turns, parser, show, write
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fedlight.diffusion.depthwise import DepthwiseConv
from fedlight.diffusion.unet import Attention, ConvNextUNet, LinearAttention
from fedlight.runtime.memory import keep_freed_memory

Step = Callable[[], object]


def heads_of(layer: LinearAttention | Attention, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(1, (layer.heads, -1)).flatten(3) for part in layer.qkv(x).chunk(3, dim=1))


class PlainLinearAttention(LinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self, self.norm(x))
        context = torch.einsum("nhdp,nhep->nhde", k.softmax(dim=-1), v)
        out = torch.einsum("nhde,nhdp->nhep", context, q.softmax(dim=-2) * q.shape[2] ** -0.5)
        return self.out(out.flatten(1, 2).unflatten(-1, x.shape[-2:])) + x


class PlainAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self, self.norm(x))
        weights = torch.einsum("nhdi,nhdj->nhij", q * q.shape[2] ** -0.5, k).softmax(dim=-1)
        out = torch.einsum("nhij,nhdj->nhdi", weights, v)
        return self.out(out.flatten(1, 2).unflatten(-1, x.shape[-2:])) + x


PLAIN = {DepthwiseConv: nn.Conv2d, LinearAttention: PlainLinearAttention, Attention: PlainAttention}


def plain(unet: ConvNextUNet) -> ConvNextUNet:
    for module in unet.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return unet


class Traffic(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of every operation that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def fastest(act: Step, device: str, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def machine_speed(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Operations and bytes a second."""
    side = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    values = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(values)
    arithmetic = 2 * side**3 / fastest(lambda: a @ b, device)
    return arithmetic, 2 * values.numel() * 4 / fastest(lambda: target.copy_(values), device)


def compile_unet(unet: nn.Module, how: str, device: str) -> None:
    """Compiles by inductor on a GPU; only traces on a CPU, where inductor takes a minute without gain."""
    if device == "cuda":
        unet.compile(mode="reduce-overhead" if how == "graphs" else None)
    else:
        unet.compile(backend="eager")


def begin(
    dtype: torch.dtype, how: str, batch: int, device: str, network: Sequence[str] = ("experiment=paper",)
) -> None:
    """Makes the step of a variant in a separate process, since a process keeps freed memory.

    `how` is plain, eager, compiled or graphs (compiled, and replayed as CUDA graphs).
    """
    global step, forward
    _, config = composed(*network)
    size = config.data.image_size
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, batch, 1, size, size, generator=generator).to(device)
    t = torch.randint(0, 1000, (batch,), generator=generator).to(device)
    torch.manual_seed(0)
    unet = instantiate(config.model.unet, _convert_="all")
    if how == "plain":
        plain(unet)
    else:
        keep_freed_memory()
        unet.to(memory_format=torch.channels_last)
    unet.to(device)
    if how in ("compiled", "graphs"):
        compile_unet(unet, how, device)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4, fused=how != "plain")

    def forward() -> Tensor:
        return unet(x, t).sample

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.smooth_l1_loss(forward().float(), eps)
        loss.backward()
        optimizer.step()
        return loss.item()


def run() -> float:
    """Runs one step; returns its loss."""
    return step()


def cost() -> tuple[float, int]:
    """Floating-point operations and bytes of a step."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    with Traffic() as traffic:
        step()
    return 3 * counter.get_total_flops(), traffic.bytes  # the output, the gradients by input and by weights


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int)
    arguments.add_argument("--device", default="cpu")
    given = arguments.parse_args()
    device, repeats = given.device, 3 if given.quick else 7
    batch = given.batch or (32 if given.quick else 128)

    asked = {
        "plain fp32": (torch.float32, "plain"),
        "fp32": (torch.float32, "eager"),
        "bf16": (torch.bfloat16, "eager"),
    }
    if device == "cuda":
        asked |= {"compiled fp32": (torch.float32, "compiled"), "compiled bf16": (torch.bfloat16, "compiled")}
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, context, begin, (dtype, how, batch, device)))
            for name, (dtype, how) in asked.items()
        }
        losses = {name: process.submit(run).result() for name, process in processes.items()}
        steps = {
            name: (lambda process=process: process.submit(run).result())
            for name, process in processes.items()
        }
        seconds = in_turns(steps, repeats)
        costs = {name: process.submit(cost).result() for name, process in processes.items()}
    limits: dict[str, tuple[float, float]] = {}
    for name, (dtype, _) in asked.items():
        (operations, traffic), (arithmetic, memory) = costs[name], machine_speed(dtype, device)
        limits[name] = operations / arithmetic, traffic / memory

    speedup = {name: seconds["plain fp32"] / value for name, value in seconds.items()}
    show(
        f"training step, paper's UNet, {batch} images of 28x28, {device}, {torch.get_num_threads()} threads",
        [
            "",
            "seconds",
            "against plain",
            "GFLOP",
            "arithmetic limit",
            "memory limit",
            "of the larger limit",
            "loss",
        ],
        [
            [
                name,
                f"{value:.4f}",
                f"{speedup[name]:.2f}x",
                f"{costs[name][0] / 1e9:.0f}",
                f"{limits[name][0]:.4f}",
                f"{limits[name][1]:.4f}",
                f"{max(limits[name]) / value:.0%}",
                f"{losses[name]:.5f}",
            ]
            for name, value in seconds.items()
        ],
    )
    ratios = {f"step {name}": value for name, value in speedup.items() if name != "plain fp32"}
    write(given.out, ratios, {"seconds": seconds, "limits": limits, "costs": costs})


if __name__ == "__main__":
    main()
