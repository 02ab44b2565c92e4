"""A training step of several small clients in one computation: forward, backward and Adam.

On a GPU the computation can be recorded as a CUDA graph, whose replay costs one launch. The random numbers
are drawn outside of it, since each client has a random state of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import composed
from torch import Tensor

from fedlight.data.class_names import DIGITS
from fedlight.diffusion.depthwise import use_stacked_layers
from fedlight.experiment.setup import make_client_model
from fedlight.federation.stack import RandomState, Stack

WARM = 3  # steps before a graph is recorded, as torch's documentation asks for


class _Alone:
    """The model of one client with the methods of a `Stack`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.random: Sequence[RandomState] = ()
        self.configure_optimizers = module.configure_optimizers

    def begin(self, random: Sequence[RandomState]) -> None:
        self.random = random

    def draw(self, batch: list[Tensor]) -> tuple[dict[str, Tensor], None, None]:
        with self.random[0]:
            return self._module.draw(batch[0]), None, None

    def losses(self, inputs: dict[str, Tensor], weights: None) -> Tensor:
        loss: Tensor = self._module.loss_of(inputs)
        return loss.reshape(1)


class FusedStep:
    """Steps of clients with the same images.

    Args:
        clients: their number; 1 for a client that trains alone.
        images: of each client in a step.
        device: cuda or cpu.
        network: overrides that choose model and data.
        graph: record the computation as a CUDA graph; on a CPU it is called instead.
    """

    def __init__(self, clients: int, images: int, device: str, network: Sequence[str], graph: bool) -> None:
        _, config = composed(*network)
        torch.manual_seed(0)
        module: Any = make_client_model(config, DIGITS).module.to(device)
        self._model: Any = _Alone(module)
        if clients > 1:
            use_stacked_layers(module)
            self._model = Stack(module, clients).to(torch.device(device))
        self._model.begin([RandomState(seed, torch.device(device)) for seed in range(clients)])
        self._optimizer = self._model.configure_optimizers()
        generator = torch.Generator().manual_seed(0)
        batch = torch.rand(images, *config.data.shape, generator=generator).to(device)
        self._batch = [batch] * clients
        self._inputs, self._weights, _ = self._model.draw(self._batch)
        self._compute: Callable[[], None] = self._compute_once
        if graph:
            for group in self._optimizer.param_groups:
                group["capturable"] = device == "cuda"
            self._record(device)

    def __call__(self) -> Tensor:
        """Takes a step; returns the loss of each client."""
        drawn, _, _ = self._model.draw(self._batch)
        for name, values in drawn.items():
            self._inputs[name].copy_(values)
        self._compute()
        return self._losses

    def _compute_once(self) -> None:
        self._optimizer.zero_grad(set_to_none=False)
        losses = self._model.losses(self._inputs, self._weights)
        losses.sum().backward()
        self._optimizer.step()
        self._losses = losses.detach()

    def _record(self, device: str) -> None:
        if device != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._compute_once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute_once()
        self._compute = graph.replay
