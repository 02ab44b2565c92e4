"""Membership inference on a finished cell: from its models, its updates and its generated images."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.data.dataset import Images
from fedlight.data.loading import load
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.prediction import to_noise
from fedlight.evaluation.memorisation import CopyCheck
from fedlight.experiment.canaries import canary_scores
from fedlight.experiment.clients import make_site
from fedlight.experiment.finished import FinishedCell
from fedlight.experiment.parts import CHECKPOINT, CellParts
from fedlight.experiment.setup import assemble, make_cell_server
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client import local_update
from fedlight.federation.messages import Broadcast, Payload, State, Update
from fedlight.federation.secure.integers import pack_integers, to_signed
from fedlight.federation.secure.secure_sum import INTEGERS, STATISTICS, SecureAggregation, SliceSums
from fedlight.federation.server import Server
from fedlight.federation.site import client_memory
from fedlight.privacy.lower_bound import lower_bound
from fedlight.privacy.membership import Attack
from fedlight.runtime.errors import Damaged
from fedlight.runtime.pixels import to_floats

LOSS_TIMES = 10  # evenly spaced time steps whose losses are averaged
PIA_TIME = 0.2  # time step as a share of the schedule's length (arXiv 2305.18355)
PIA_NORM = 4
BATCH = 256
GENERATED = 256  # images, for the extraction measure
LabelledImages: TypeAlias = tuple[Tensor, Tensor]
"""Pixels, uint8, shape (n, channels, height, width), and labels, int64, shape (n,)."""
ImageScore: TypeAlias = Callable[[DDPM, Tensor, Tensor, torch.Generator], Tensor]
"""(model, x_0 in [-1, 1], labels, noise generator) -> a score of each image, float64, shape (n,)."""


class Attacker:
    """Scores training images (members) and test images (non-members) by what a participant observes.

    Args:
        cell: the cell to attack.
        images: maximum number of members and of non-members, drawn at random.
        clients: maximum number of clients whose updates are attacked.
        seed: decides all random draws.
    """

    def __init__(self, cell: FinishedCell, images: int, clients: int, seed: int) -> None:
        self._cell = cell
        self._parts: CellParts = assemble(cell.config, load(cell.config.data))
        self._images = images
        self._clients = clients
        self._seed = seed
        privacy = self._parts.config.privacy
        self._delta = privacy.delta if privacy else 1e-5
        test = self._parts.dataset.test
        self._nonmembers = self._choose(test, np.arange(len(test)))

    def report(self, client: int | None) -> dict[str, Any]:
        """Runs all attacks; returns what `audit.json` says of them.

        Args:
            client: whose own model is attacked; None for the global one.

        Raises:
            BadInput: there is no such model.
            Diverged: a model's predictions are not finite.
        """
        attacks = [*self._attack_model(client), *self._attack_updates()]
        result: dict[str, Any] = {
            "cell": self._cell.folder.name,
            "delta": self._delta,
            "attacks": [attack.summary(self._delta) for attack in attacks],
            "extraction": self._measure_extraction(client),
        }
        privacy = self._parts.config.privacy
        if privacy and privacy.name == "client":
            scores = canary_scores(self._parts.config, self._parts.noise, self._seed)
            result["canaries"] = {"epsilon_lower": lower_bound(*scores, self._delta)}
        return result

    def _attack_model(self, client: int | None) -> Iterator[Attack]:
        """Attacks a trained model by the loss of each image and by PIA (arXiv 2305.18355)."""
        state = self._cell.state(client)
        members = self._members(client)
        sees = "released model" if client is None else f"model of client {client}"
        for name, score in (("loss", _losses), ("PIA", _proximal_errors)):
            scores = [-self._score(state, images, score) for images in (members, self._nonmembers)]
            yield Attack(sees, name, *scores)

    def _attack_updates(self, received: Mapping[int, Update] | None = None) -> Iterator[Attack]:
        """Attacks updates and their slices, by how much each lowers the loss of an image, as a server could.

        Makes no attack where clients send no updates, or the checkpoint before the last round is missing.

        Args:
            received: client: its masked update of the last round, as it arrived; None to simulate the masks.
        """
        parts, folder, rounds = self._parts, self._cell.folder, self._cell.server.round
        server = make_cell_server(folder.name, parts)
        server.resume(ServerCheckpoint(folder / CHECKPOINT, folder.name, repair=False), before=rounds)
        if parts.method.pool or not parts.method.uplink or server.round != rounds - 1:
            return
        before = server.global_state()
        others = self._score(before, self._nonmembers, _losses)
        if parts.aggregation:
            yield from self._attack_sums(server, parts.aggregation, before, others, received)
            return
        for broadcast, update in self._repeat_round(server, self._clients):
            client, uplink, (reported, _) = broadcast.client, broadcast.uplink, server.decode(update)
            images = self._members(client), self._nonmembers
            losses = self._score(before, images[0], _losses), others
            updates = {slice_: parts.slices.select([slice_], reported) for slice_ in uplink}
            for observed, values in {**updates, "all slices": reported}.items():
                after = (self._score({**before, **values}, side, _losses) for side in images)
                drops = [loss - trained for loss, trained in zip(losses, after, strict=True)]
                yield Attack(f"update of client {client}: {observed}", "loss drop", *drops)

    def _attack_sums(
        self,
        server: Server,
        secure: SecureAggregation,
        before: State,
        others: NDArray[np.float64],
        received: Mapping[int, Update] | None,
    ) -> Iterator[Attack]:
        """Attacks what a server sees under secure aggregation: a masked update, and the sum of a cohort.

        Beside them stands the update before it is masked, which the server does not see.

        Args:
            server: after all rounds but the last.
            secure: of the cell.
            before: the global model then.
            others: losses of non-members under it.
            received: as for `_attack_updates`.
        """
        cohort = SliceSums(secure, before)
        updates = [update for _, update in self._repeat_round(server, None)]
        for update in updates:
            cohort.add(update)
        fewest = secure.smallest_sums(server.planned)
        mean: State = {}
        for slice_, clients in cohort.reporters.items():
            if len(clients) >= fewest[slice_]:
                mean |= cohort.decode(slice_).values
        rng, spread = np.random.default_rng(self._seed), _spread(mean, before)
        for update in updates[: self._clients]:
            alone = SliceSums(secure, before)
            alone.add(update)
            arrived = received[update.client] if received else _mask(secure, update, before, rng)
            masked = _read_masked(secure, arrived, before, spread)
            plain = {n: t for slice_ in update.payloads for n, t in alone.decode(slice_).values.items()}
            who = f"client {update.client}"
            images = self._members(update.client)
            yield self._attack_change(f"update of {who} before its mask", before, plain, images, others)
            seen = f"server, under secure aggregation: masked update of {who}"
            yield self._attack_change(seen, before, masked, images, others)
        if mean:
            trained = sorted(set().union(*cohort.reporters.values()))
            indices = np.concatenate([self._parts.client_indices[client] for client in trained])
            images = self._choose(self._parts.dataset.train, indices)
            seen = f"server, under secure aggregation: sum of {len(trained)} clients"
            yield self._attack_change(seen, before, mean, images, others)

    def _attack_change(
        self, sees: str, before: State, values: State, members: LabelledImages, others: NDArray[np.float64]
    ) -> Attack:
        """Attacks a change of the global model by how much it lowers the loss of each image."""
        after = {**before, **{name: tensor.to(before[name].dtype) for name, tensor in values.items()}}
        losses = self._score(before, members, _losses), others
        changed = (self._score(after, side, _losses) for side in (members, self._nonmembers))
        drops = [loss - trained for loss, trained in zip(losses, changed, strict=True)]
        return Attack(sees, "loss drop", *drops)

    def _repeat_round(self, server: Server, clients: int | None) -> Iterator[tuple[Broadcast, Update]]:
        """Repeats the server's next round for the first clients, or for all; yields broadcast and update.

        A client whose memory is missing is left out. Nothing of the repetition is kept.
        """
        parts, folder = self._parts, self._cell.folder
        memory = client_memory(folder / CHECKPOINT, folder.name, repair=False)
        with TemporaryDirectory() as scratch:
            (Path(scratch) / CHECKPOINT).mkdir()
            setup = make_site(parts, Path(scratch)).setup
            chosen: list[Broadcast] = [one for one in server.start_round() if not one.drops_out]
            for broadcast in chosen[:clients]:
                try:
                    kept = memory.read(broadcast.client, broadcast.previous) if broadcast.previous else {}
                except Damaged:
                    kept = {}
                if setup.keeps_memory and broadcast.previous and not kept:
                    continue
                parts.model.train()  # _score leaves it in evaluation mode
                update, _ = local_update(broadcast, kept, setup)
                assert update is not None
                yield broadcast, update

    def _measure_extraction(self, client: int | None) -> dict[str, Any]:
        """The memorisation check of generated images, with distances between pixels in [0, 1]."""
        drawn = self._cell.sample(client, GENERATED, seed=self._seed)
        train, test = self._members(client)[0], self._nonmembers[0]
        flat = [pixels.flatten(1).float() / 255 for pixels in (train, test, drawn)]
        return CopyCheck(flat[0], flat[1])(flat[2]).summary()

    def _members(self, client: int | None) -> LabelledImages:
        """Images that the client trained on; those of all clients where `client` is None."""
        client_indices = self._parts.client_indices
        indices = np.concatenate(client_indices) if client is None else client_indices[client]
        return self._choose(self._parts.dataset.train, indices)

    def _choose(self, split: Images, indices: NDArray[np.int64]) -> LabelledImages:
        rng = np.random.default_rng(self._seed)
        chosen = np.sort(rng.permutation(indices)[: self._images])
        return split.pixels[chosen], torch.from_numpy(split.labels[chosen])

    def _score(self, state: State, images: LabelledImages, score: ImageScore) -> NDArray[np.float64]:
        """The score of each image under the model with this state_dict, shape (n,)."""
        module = self._parts.model.to(self._parts.device)
        module.load_state_dict(state)
        module.eval()
        generator = torch.Generator().manual_seed(self._seed)
        scores = []
        with torch.no_grad():
            for pixels, labels in zip(*(tensor.split(BATCH) for tensor in images), strict=True):
                on_device, latents = pixels.to(module.device), self._parts.latents
                x_0 = latents.encode(on_device) if latents else to_floats(on_device)
                scores.append(score(module, x_0, labels.to(module.device), generator).cpu())
        return torch.cat(scores).numpy()


def _mask(secure: SecureAggregation, update: Update, before: State, rng: np.random.Generator) -> Update:
    """An update with a uniform mask, as one arrives where the masks are real."""
    bits, payloads = secure.fixed.modulus_bits, {}
    for slice_, payload in update.payloads.items():
        vector = secure.check_payload(slice_, payload, before)
        mask = rng.integers(0, 2**64, len(vector), dtype=np.uint64)
        payloads[slice_] = Payload({INTEGERS: pack_integers(vector + mask, bits)}, payload.params)
    return replace(update, payloads=payloads)


def _read_masked(secure: SecureAggregation, update: Update, before: State, spread: float) -> State:
    """What a server can read of a masked update: its integers as changes of the size of the mean change.

    Args:
        secure: of the cell.
        update: masked.
        before: the global model that the clients received.
        spread: root mean square of the mean change, which the server knows.
    """
    values: State = {}
    for slice_, payload in update.payloads.items():
        vector = secure.check_payload(slice_, payload, before)
        received = to_signed(vector, secure.fixed.modulus_bits)[STATISTICS:]
        change = received / 2.0 ** (secure.fixed.modulus_bits - 1) * np.sqrt(3) * spread
        values |= secure.add_changes(slice_, before, change, update.round)[0]
    return values


def _spread(mean: State, before: State) -> float:
    """The root mean square of a change of the global model."""
    changes = [(tensor - before[name].double()).flatten() for name, tensor in mean.items()]
    return float(torch.cat(changes).square().mean().sqrt()) if changes else 0.0


def _losses(module: DDPM, x_0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The mean squared error of the predicted noise over time steps, of each image, float64, shape (n,).

    In double precision, since a model trained with much noise may predict huge values.
    """
    length = module.schedule.config.num_train_timesteps
    losses = []
    for number in range(LOSS_TIMES):
        t = torch.full((len(x_0),), int((number + 0.5) / LOSS_TIMES * length), device=x_0.device)
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        predicted = _predict_noise(module, module.schedule.add_noise(x_0, eps, t), t, labels)
        losses.append((predicted - eps).double().square().flatten(1).mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def _proximal_errors(module: DDPM, x_0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """PIA's distance between the noise predicted at t = 0 and at PIA_TIME, once it is added, shape (n,).

    In double precision, since a fourth power soon overflows float32.
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
