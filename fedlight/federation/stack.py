"""Several clients as one LightningModule: their tensors are stacked along a new first dimension."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from types import TracebackType
from typing import Any, Protocol

import torch
from lightning import Callback, LightningDataModule, Trainer
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
    """A client model whose training step is `loss_of(draw(batch))`, so that it can be fused.

    It may also have `stacked_losses(drawn, weights)`, called where its parameters have a further first
    dimension: the losses of several clients without `torch.func.vmap`, or None where it cannot.
    """

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
        is_counter = tensor.dim() == 0 and not tensor.is_floating_point()
        if tensor.dim() == 0 if name in parameters else not is_counter:
            what = "a parameter without a dimension" if name in parameters else "a buffer"
            raise BadInput(
                f"trainer.fuse: {name} is {what}, which cannot be stacked: choose trainer.fuse=null"
            )
    pair = Stack(module, 2)
    pair.begin([RandomState(0, module.device) for _ in range(2)])
    try:
        pair.training_step([batch, batch], 0)["loss"].backward()
    except RuntimeError as error:
        raise BadInput(
            f"trainer.fuse: torch.func.vmap cannot stack the model ({format_error(error)}): choose "
            "trainer.fuse=null"
        ) from error


class StackedData(LightningDataModule):
    """The batches of several clients: a list in each step, of the clients that are not done.

    Args:
        clients: their data.
        random: their states of torch's generators.
        batches: of a local epoch of each client, the most first.
        epochs: local epochs.
    """

    def __init__(
        self,
        clients: Sequence[LightningDataModule],
        random: Sequence[RandomState],
        batches: Sequence[int],
        epochs: int,
    ) -> None:
        super().__init__()
        self._clients = clients
        self._random = random
        self._batches = batches
        self._epochs = epochs

    def train_dataloader(self) -> "StackedBatches":
        loaders = [data.train_dataloader() for data in self._clients]
        return StackedBatches(loaders, self._random, self._batches, self._epochs)

    def on_after_batch_transfer(self, batch: list[Any], dataloader_idx: int) -> list[Any]:
        pairs = zip(self._clients, batch, strict=False)
        return [data.on_after_batch_transfer(part, dataloader_idx) for data, part in pairs]


class StackedBatches:
    """Iterates over the loaders of several clients in step.

    An epoch of the Trainer is one of the clients with most batches. The others begin their next epoch within
    it, so that they are done earlier than these, and have the same number of steps until then.
    """

    def __init__(
        self, loaders: Sequence[Any], random: Sequence[RandomState], batches: Sequence[int], epochs: int
    ) -> None:
        self._longest = len(loaders[0])
        self._largest = batches.count(batches[0])
        self._parts = list(zip(loaders, random, batches, strict=True))
        self._others = [_draw_batches(*part, epochs) for part in self._parts[self._largest :]]

    def __len__(self) -> int:
        """Batches of the largest client before `trainer.limit_train_batches`."""
        return self._longest

    def __iter__(self) -> Iterator[list[Any]]:
        streams = [_draw_batches(*part, epochs=1) for part in self._parts[: self._largest]]
        streams += self._others
        batches = self._parts[0][2]
        for _ in range(batches):
            yield [batch for stream in streams for batch in islice(stream, 1)]


def _draw_batches(loader: Any, random: RandomState, batches: int, epochs: int) -> Iterator[Any]:
    """The batches of one client's epochs; its random numbers are drawn when a batch is taken."""
    for _ in range(epochs):
        with random:
            iterator = iter(loader)
        for _ in range(batches):
            with random:
                batch = next(iterator)
            yield batch


class Stack(ResidentModule):
    """Several clients' models as one, with the names of one: each parameter has a further first dimension.

    Frozen parameters are shared by the clients and are not stacked.

    A training step is that of all clients at once, by the module's `stacked_losses` or by `torch.func.vmap`;
    convolutions with a kernel for each client are grouped ones. The loss is the sum of the clients' losses,
    so that each client has the gradient that it has alone. Shorter batches are padded with images of weight
    0.

    A client that is done leaves: the parameters and the optimizer's state become views of the first clients,
    those with more batches, and what the client has trained stays where it is until `gather`.

    Args:
        module: the model of one client.
        clients: their number.

    Attributes:
        random: of each client; set by `begin`.
        client_steps: optimizer steps of each client; empty until `gather`.
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
        self._stacked_losses = getattr(stacked, "stacked_losses", lambda drawn, weights: None)
        self.random: Sequence[RandomState] = ()
        self.client_steps: list[int] = []
        for name, child in stacked.named_children():
            self.add_module(name, child)
        self._named: dict[str, Tensor] = {
            f"module.{name}": p for name, p in self.named_parameters() if name not in frozen
        }
        self.leave_out(frozen)
        self._clients = self._present = clients
        self._scalars = [
            (child, name)
            for child in stacked.modules()
            for name, buffer in child.named_buffers(recurse=False)
            if buffer.dim() == 0 and name not in child._non_persistent_buffers_set
        ]
        self._left: list[_Left] = []

    def begin(self, random: Sequence[RandomState]) -> None:
        """Prepares a fit of all clients, with their states of torch's generators."""
        self.random = random
        self.client_steps = []
        self._widen()
        for child, name in self._scalars:
            if (buffer := child._buffers[name]).dim():
                child._buffers[name] = buffer[0].clone()

    def on_train_batch_start(self, batch: list[Any], batch_idx: int) -> None:
        if len(batch) < self._present:
            self._take_out(len(batch), self.trainer.optimizers[0])

    def gather(self, optimizer: Optimizer, steps: int) -> None:
        """Puts the clients that left back, after the last step.

        Where some did, scalars that differ between clients, such as an optimizer's step counts, become
        tensors of shape (clients,).

        Args:
            optimizer: of the fit.
            steps: of the clients that did not leave.
        """
        if not self._left:
            self.client_steps = [steps] * self._clients
            return
        last = _Left.note(self, optimizer, self._present, steps)
        clients = [entry for entry in (last, *reversed(self._left)) for _ in range(entry.clients)]
        self._widen()
        self.client_steps = [entry.steps for entry in clients]
        for place, (child, name) in enumerate(self._scalars):
            child._buffers[name] = torch.stack([entry.buffers[place] for entry in clients])
        for parameter, key, tensor in list(_optimizer_tensors(optimizer)):
            values = [entry.optimizer[parameter, key] for entry in clients]
            optimizer.state[parameter][key] = values[-1] if tensor.dim() else torch.stack(values)

    def _take_out(self, present: int, optimizer: Optimizer) -> None:
        """Leaves the first clients in the stack."""
        gone = self._present - present
        self._left.append(_Left.note(self, optimizer, gone, self.trainer.global_step))
        self._present = present
        for parameter in self._named.values():
            parameter.grad = None
            parameter.data = parameter.data[:present]
        for parameter, key, tensor in list(_optimizer_tensors(optimizer)):
            if tensor.dim():
                optimizer.state[parameter][key] = tensor[:present]

    def _widen(self) -> None:
        """Gives the parameters back the clients that left."""
        if self._left:
            for parameter, whole in zip(self._named.values(), self._left[0].parameters, strict=True):
                parameter.grad = None
                parameter.data = whole
        self._left, self._present = [], self._clients

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
        for part, random in zip(batch, self.random, strict=False):
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
        computed: Tensor | None = self._stacked_losses(inputs, weights)
        if computed is not None:
            return computed
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


@dataclass(frozen=True)
class _Left:
    """Clients that left a stack together.

    Attributes:
        clients: their number.
        steps: optimizer steps of each.
        parameters: the stack's, before they left.
        buffers: values of the scalar buffers.
        optimizer: by parameter and key, scalars of the optimizer's state, and its tensors before they left.
    """

    clients: int
    steps: int
    parameters: list[Tensor]
    buffers: list[Tensor]
    optimizer: dict[tuple[Tensor, str], Tensor]

    @classmethod
    def note(cls, stack: Stack, optimizer: Optimizer, clients: int, steps: int) -> "_Left":
        parameters = [parameter.data for parameter in stack._named.values()]
        buffers = [child._buffers[name].clone() for child, name in stack._scalars]
        state = {
            (parameter, key): tensor if tensor.dim() else tensor.clone()
            for parameter, key, tensor in _optimizer_tensors(optimizer)
        }
        return cls(clients, steps, parameters, buffers, state)


def _optimizer_tensors(optimizer: Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """The tensors of an optimizer's state: parameter, key, tensor."""
    for parameter, entry in optimizer.state.items():
        for key, tensor in entry.items():
            if isinstance(tensor, Tensor):
                yield parameter, key, tensor


class Gathering(Callback):
    """Puts the clients that left a stack back before other callbacks look at the end of the fit."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.gather(trainer.optimizers[0], trainer.global_step)


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
