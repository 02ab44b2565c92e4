"""An attacker against a finished cell: does what was seen of it tell who was trained on?"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.prediction import to_noise
from fedlight.evaluation.memorisation import CopyCheck
from fedlight.experiment.canaries import canary_scores
from fedlight.experiment.finished import FinishedCell
from fedlight.experiment.setup import CHECKPOINT, Components, assemble, load_data, make_server
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client import local_update
from fedlight.federation.messages import Broadcast, State
from fedlight.federation.site import client_memory
from fedlight.privacy.lower_bound import lower_bound
from fedlight.privacy.membership import Attack
from fedlight.runtime.errors import Damaged
from fedlight.runtime.pixels import to_floats

TIMES = 10  # time steps at which losses are taken, spread evenly
PIA_TIME = 0.2  # of the schedule, as in the paper
PIA_NORM = 4
BATCH = 256
GENERATED = 256
Images = tuple[Tensor, Tensor]
"""Pixels, uint8, shape (n, channels, height, width), and labels, int64, shape (n,)."""


class Attacker:
    """Knows images, some of which were trained on, and what it sees of the federation.

    Args:
        cell: finished.
        images: of each side at most, drawn at random.
        clients: whose updates the server looks at, at most.
        seed: decides draws.
    """

    def __init__(self, cell: FinishedCell, images: int, clients: int, seed: int) -> None:
        self._cell = cell
        self._parts: Components = assemble(cell.config, load_data(cell.config))
        self._images = images
        self._clients = clients
        self._seed = seed
        privacy = self._parts.config.privacy
        self._delta = privacy.delta if privacy else 1e-5
        self._others = self._pick(self._parts.dataset.test, np.arange(len(self._parts.dataset.test)))

    def report(self, client: int | None) -> dict[str, Any]:
        """All attacks; `client` is whose own model is attacked, None for the global one."""
        attacks = [*self._on_model(client), *self._on_updates()]
        result: dict[str, Any] = {
            "cell": self._cell.folder.name,
            "delta": self._delta,
            "attacks": [attack.summary(self._delta) for attack in attacks],
            "extraction": self._extraction(client),
        }
        privacy = self._parts.config.privacy
        if privacy and privacy.name == "client":
            scores = canary_scores(self._parts.config, self._seed)
            result["canaries"] = {"epsilon_lower": lower_bound(*scores, self._delta)}
        return result

    def _on_model(self, client: int | None) -> Iterator[Attack]:
        """Loss threshold and PIA (arXiv 2305.18355) on the released model."""
        state = self._cell.state(client)
        members = self._members(client)
        sees = "released model" if client is None else f"model of client {client}"
        for name, score in (("loss", _losses), ("PIA", _proximal_errors)):
            found = [-self._scored(state, images, score) for images in (members, self._others)]
            yield Attack(sees, name, *found)

    def _on_updates(self) -> Iterator[Attack]:
        """How much an update, or one slice of it, lowers the loss of each image, for the server.

        The last round is done again from the checkpoint before it; nothing of it is kept.
        """
        parts, folder, rounds = self._parts, self._cell.folder, self._cell.config.rounds
        server = make_server(
            folder.name, parts.config, parts.module, parts.slices, parts.algorithm, parts.codec
        )
        checkpoint = folder / CHECKPOINT
        server.resume(ServerCheckpoint(checkpoint, folder.name, repair=False), before=rounds)
        if parts.method.pool or not parts.method.uplink or server.round != rounds - 1:
            return
        memory = client_memory(checkpoint, folder.name, repair=False)
        before = server.global_state()
        with TemporaryDirectory() as nowhere:
            (Path(nowhere) / CHECKPOINT).mkdir()
            setup = parts.site(Path(nowhere)).setup
            chosen: list[Broadcast] = [one for one in server.broadcasts() if not one.drops_out]
            for broadcast in chosen[: self._clients]:
                client = broadcast.client
                try:
                    kept = memory.read(client, broadcast.previous) if broadcast.previous else {}
                except Damaged:
                    kept = {}
                if setup.keeps_memory and broadcast.previous and not kept:
                    continue
                parts.module.train()  # scoring leaves it in evaluation mode
                update, _ = local_update(broadcast, kept, setup)
                assert update is not None
                members = self._members(client)
                seen, _ = server.decode(update)
                for slice_ in broadcast.uplink:
                    values = parts.slices.select([slice_], seen)
                    yield self._drop(client, slice_, before, values, members)
                yield self._drop(client, "all slices", before, seen, members)

    def _drop(self, client: int, slice_: str, before: State, values: State, members: Images) -> Attack:
        scores = [
            self._scored(before, images, _losses) - self._scored({**before, **values}, images, _losses)
            for images in (members, self._others)
        ]
        return Attack(f"update of client {client}: {slice_}", "loss drop", *scores)

    def _extraction(self, client: int | None) -> dict[str, float]:
        """Whether generated images lie nearer to training images than unseen ones do, in pixels."""
        drawn = self._cell.draw(client, GENERATED, self._seed)
        train, test = self._members(client)[0], self._others[0]
        flat = [pixels.flatten(1).float() / 255 for pixels in (train, test, drawn)]
        return CopyCheck(flat[0], flat[1])(flat[2]).summary()

    def _members(self, client: int | None) -> Images:
        shares = self._parts.shares
        indices = np.concatenate(shares) if client is None else shares[client]
        return self._pick(self._parts.dataset.train, indices)

    def _pick(self, split: Any, indices: NDArray[np.int64]) -> Images:
        rng = np.random.default_rng(self._seed)
        chosen = np.sort(rng.permutation(indices)[: self._images])
        return split.pixels[chosen], torch.from_numpy(split.labels[chosen])

    def _scored(self, state: State, images: Images, score: Any) -> NDArray[np.float64]:
        """The score of each image under a model."""
        module = self._parts.module.to(self._parts.device)
        module.load_state_dict(state)
        module.eval()
        generator = torch.Generator().manual_seed(self._seed)
        found = []
        with torch.no_grad():
            for pixels, labels in zip(*(tensor.split(BATCH) for tensor in images), strict=True):
                x_0 = to_floats(pixels.to(module.device))
                found.append(score(module, x_0, labels.to(module.device), generator).cpu())
        return torch.cat(found).numpy()


def _losses(module: DDPM, x_0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The mean squared error of each image's prediction over time steps, float64, shape (n,).

    In double precision, since the predictions of a model drowned in noise may be huge.
    """
    length = module.schedule.config.num_train_timesteps
    losses = []
    for number in range(TIMES):
        t = torch.full((len(x_0),), int((number + 0.5) / TIMES * length), device=x_0.device)
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        predicted = _predict_noise(module, module.schedule.add_noise(x_0, eps, t), t, labels)
        losses.append((predicted - eps).double().square().flatten(1).mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def _proximal_errors(module: DDPM, x_0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The distance of PIA between the noise predicted at t = 0 and that predicted where it was added.

    Float64, as for the losses: a fourth power soon leaves float32.
    """
    t = torch.full((len(x_0),), int(PIA_TIME * module.schedule.config.num_train_timesteps), device=x_0.device)
    eps = _predict_noise(module, x_0, torch.zeros_like(t), labels)
    again = _predict_noise(module, module.schedule.add_noise(x_0, eps, t), t, labels)
    return (eps - again).double().flatten(1).norm(PIA_NORM, dim=1)


def _predict_noise(module: DDPM, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    condition = {} if module.label_dropout is None else {"class_labels": labels}
    predicted: Tensor = module.denoiser(x_t, t, **condition).sample
    alpha_bar = module.schedule.alphas_cumprod.to(x_t)[t].view(-1, 1, 1, 1)
    return to_noise(predicted, x_t, alpha_bar, module.schedule.config.prediction_type)
