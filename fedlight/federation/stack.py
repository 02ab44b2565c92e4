"""Several clients as one LightningModule: their tensors are stacked along a new first dimension."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from fedlight.federation.messages import State
from fedlight.runtime.errors import BadInput, format_error
from fedlight.runtime.resident_module import ResidentModule
from fedlight.runtime.training_loss import CLIENT_IMAGES, CLIENT_LOSSES
from fedlight.runtime.vmap import vmap


class Fusible(Protocol):
    """A client model whose training step is `loss_of(draw(batch))`, so that it can be fused."""

    def draw(self, batch: Any) -> dict[str, Tensor]:
        """Draws all random numbers of a step; the first dimension of every tensor is that of the images."""

    def loss_of(self, drawn: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """The sum of the images' losses with these weights, shape (n,), or their mean; draws no number."""


def stack(states: Sequence[State]) -> State:
    """Stacks the tensors of several clients by name; those without a dimension are equal and stay.

    The states have the same names. A single state is returned unchanged.
    """
    if len(states) == 1:
        return states[0]
    return {name: _stack_tensors([state[name] for state in states]) for name in states[0]}


def _stack_tensors(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    if first.dim() == 0:
        return first
    if all(tensor is first for tensor in tensors):  # as received by all clients: no copies
        return first.expand(len(tensors), *first.shape)
    return torch.stack(tensors)


def unstack(state: State, clients: int) -> list[State]:
    """The tensors of each client; the reverse of `stack`."""
    if clients == 1:
        return [state]
    parts = {name: tensor.unbind() if tensor.dim() else [tensor] * clients for name, tensor in state.items()}
    return [{name: tensors[place] for name, tensors in parts.items()} for place in range(clients)]


class RandomState:
    """The state of torch's generators for one client; `with` it, numbers are drawn as the client does alone.

    Args:
        seed: of the client's local update.
        device: that it trains on.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        generator = torch.Generator().manual_seed(seed)  # as torch.manual_seed, in less time
        self._cpu_state = generator.get_state()
        if self._cuda:
            self._cuda_state = torch.Generator(device).manual_seed(seed).get_state()

    def __enter__(self) -> None:
        torch.set_rng_state(self._cpu_state)
        if self._cuda:
            torch.cuda.set_rng_state(self._cuda_state, self._cuda)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cpu_state = torch.get_rng_state()
        if self._cuda:
            self._cuda_state = torch.cuda.get_rng_state(self._cuda)


ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    )
}
"""Optimizers that treat each element of a parameter by itself."""


def check_stackable(module: Any, batch: Any, optimizer: Optimizer) -> None:
    """Takes a step of two stacked clients with the same batch, and leaves the module unchanged.

    Raises:
        BadInput: the module, or the optimizer, cannot be stacked; the message says why.
    """
    if type(optimizer) not in ELEMENTWISE:
        names = ", ".join(sorted(kind.__name__ for kind in ELEMENTWISE))
        raise BadInput(
            f"trainer.fuse: {type(optimizer).__name__} is not one of {names}: choose trainer.fuse=null"
        )
    parameters = dict(module.named_parameters())
    every_name = (name for name, _ in module.named_parameters(remove_duplicate=False))
    if shared := next((name for name in every_name if name not in parameters), None):
        raise BadInput(f"trainer.fuse: {shared} is the parameter of two layers: choose trainer.fuse=null")
    for name, tensor in module.state_dict().items():
        if (tensor.dim() == 0) == (name in parameters):
            what = "a parameter without a dimension" if name in parameters else "a buffer"
            raise BadInput(
                f"trainer.fuse: {name} is {what}, which cannot be stacked: choose trainer.fuse=null"
            )
    pair = Stack(module, 2)
    pair.random = [RandomState(0, module.device) for _ in range(2)]
    try:
        pair.training_step([batch, batch], 0)["loss"].backward()
    except RuntimeError as error:
        raise BadInput(
            f"trainer.fuse: torch.func.vmap cannot stack the model ({format_error(error)}): choose "
            "trainer.fuse=null"
        ) from error


class StackedData(LightningDataModule):
    """The batches of several clients, a list in each step; all clients have the same number of batches."""

    def __init__(self, clients: Sequence[LightningDataModule], random: Sequence[RandomState]) -> None:
        super().__init__()
        self._clients = clients
        self._random = random

    def train_dataloader(self) -> "StackedBatches":
        return StackedBatches([data.train_dataloader() for data in self._clients], self._random)

    def on_after_batch_transfer(self, batch: list[Any], dataloader_idx: int) -> list[Any]:
        pairs = zip(self._clients, batch, strict=True)
        return [data.on_after_batch_transfer(part, dataloader_idx) for data, part in pairs]


class StackedBatches:
    """Iterates over the loaders of several clients in step."""

    def __init__(self, loaders: Sequence[Any], random: Sequence[RandomState]) -> None:
        self._loaders = loaders
        self._random = random

    def __len__(self) -> int:
        return len(self._loaders[0])

    def __iter__(self) -> Iterator[list[Any]]:
        iterators = []
        for loader, random in zip(self._loaders, self._random, strict=True):
            with random:
                iterators.append(iter(loader))
        for _ in range(len(self)):
            batch = []
            for iterator, random in zip(iterators, self._random, strict=True):
                with random:
                    batch.append(next(iterator))
            yield batch


class Stack(ResidentModule):
    """Several clients' models as one, with the names of one: each parameter has a further first dimension.

    Frozen parameters are shared by the clients and are not stacked.

    A training step is that of all clients at once, by `torch.func.vmap`; convolutions with a kernel for each
    client are grouped ones. The loss is the sum of the clients' losses, so that each client has the gradient
    that it has alone. Shorter batches are padded with images of weight 0.

    Args:
        module: the model of one client.
        clients: their number.

    Attributes:
        random: of each client; set before a fit.
    """

    def __init__(self, module: Any, clients: int) -> None:
        super().__init__()
        module.trainer = None  # of an earlier fit
        frozen: frozenset[str] = getattr(module, "frozen", frozenset())
        shared = {id(p): p for name, p in module.named_parameters() if name in frozen}
        stacked = deepcopy(module, dict(shared))
        for child in stacked.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and id(parameter) not in shared:
                    several = parameter.detach().expand(clients, *parameter.shape).clone()
                    child._parameters[name] = nn.Parameter(several.contiguous())
        self._one = (_Loss(module),)  # in tuples: these are not children
        self._stacked = (stacked,)
        self.random: Sequence[RandomState] = ()
        for name, child in stacked.named_children():
            self.add_module(name, child)
        self._named: dict[str, Tensor] = {
            f"module.{name}": p for name, p in self.named_parameters() if name not in frozen
        }
        self.leave_out(frozen)

    def training_step(self, batch: list[Any], batch_idx: int) -> dict[str, Tensor]:
        """The sum of the clients' losses, and the loss and the number of images of each."""
        inputs, weights, images = self.draw(batch)
        losses = self.losses(inputs, weights)
        return {"loss": losses.sum(), CLIENT_LOSSES: losses.detach(), CLIENT_IMAGES: images}

    def draw(self, batch: list[Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Draws all random numbers of a step, for each client those that it draws alone.

        Returns:
            What each client has drawn, stacked and padded to the same number of images; the weights of the
            images' losses, 0 for padding, shape (clients, images); and the clients' numbers of images.
        """
        drawn = []
        for part, random in zip(batch, self.random, strict=True):
            with random:
                drawn.append(self._one[0].module.draw(part))
        inputs = {name: pad_sequence([part[name] for part in drawn], batch_first=True) for name in drawn[0]}
        images = torch.tensor([len(next(iter(part.values()))) for part in drawn], device=self.device)
        longest = next(iter(inputs.values())).shape[1]
        present = torch.arange(longest, device=self.device) < images[:, None]
        weights = present.to(next(iter(self._named.values())).dtype) / images[:, None]
        return inputs, weights, images

    def losses(self, inputs: dict[str, Tensor], weights: Tensor) -> Tensor:
        """The loss of each client for what `draw` has drawn, shape (clients,)."""
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the others
            losses: Tensor = vmap(self._loss)(self._named, inputs, weights)
        return losses

    def _loss(self, parameters: dict[str, Tensor], drawn: dict[str, Tensor], weights: Tensor) -> Tensor:
        loss: Tensor = functional_call(self._one[0], parameters, (drawn, weights), tie_weights=False)
        return loss

    def configure_optimizers(self) -> Any:
        return self._stacked[0].configure_optimizers()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient of each client by itself."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (gradient_clip_val / (norms + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stacked[0].on_train_batch_end(outputs, batch, batch_idx)


@lru_cache(maxsize=2)
def cached_stack(module: Any, clients: int) -> Stack:
    """The stacks of the last groups; equally large groups differ by one client at most."""
    return Stack(module, clients)


class _Loss(nn.Module):
    """The loss of one client's step as a module's `forward`."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, drawn: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        loss: Tensor = self.module.loss_of(drawn, weights)
        return loss
