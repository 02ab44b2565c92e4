"""A cell between institutions: what the server runs, and what each institution answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from fedlight.config import CellConfig, PartitionConfig, validate
from fedlight.experiment.agreement import agreed_hash, check_agreed, read_agreement
from fedlight.experiment.build import CHECKPOINT, Components, build, make_algorithm
from fedlight.experiment.execute import run_cell
from fedlight.experiment.targets import check_targets
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import Broadcast, Evaluation, fingerprint, from_bytes, to_bytes
from fedlight.federation.site import Site
from fedlight.federation.transport.flower import Flower
from fedlight.runs.identity import cell_folder, cell_id
from fedlight.runtime.errors import BadInput, Damaged
from fedlight.runtime.files import atomic
from fedlight.runtime.lock import hold


def serve(grid: Any, path: Path, run_config: dict[str, Any]) -> None:
    """Runs the cell of an agreement inside a Flower ServerApp.

    Args:
        grid: Flower's way to the nodes.
        path: of the agreement.
        run_config: `output`, the folder for the cell's folder; `data-root`, images of the server's own to
            score with, or nothing.
    """
    settings = agreed(path, str(run_config["data-root"]) or None)
    settings = settings.model_copy(update={"output": str(run_config["output"])})
    Flower.grid, Flower.agreed = grid, agreed_hash(path)
    folder = cell_folder(settings)
    with hold(folder) as held:
        run_cell(settings, held, build_server)


def agreed(path: Path, root: str | None) -> CellConfig:
    """The settings of an agreement, on this machine.

    Raises:
        BadInput: it would run other code than that of fedlight, diffusers and torch, or cannot be deployed.
    """
    config = read_agreement(path, root)
    check_targets(config)
    settings = validate(OmegaConf.create(config))
    check_deployable(settings)
    return settings


def check_deployable(settings: CellConfig) -> None:
    """Raises BadInput for what needs one place that sees all images, or clients that fail on purpose."""
    algorithm = make_algorithm(settings)
    if type(algorithm).report is not FedAvg.report and not algorithm.extras_like({"": torch.zeros(1)}):
        raise BadInput(
            f"algorithm={settings.algorithm and settings.algorithm.name} does not say by extras_like what "
            "clients report, and the server must know it to refuse what does not fit"
        )
    if settings.method.pool:
        raise BadInput(
            f"method={settings.method.name} trains where all images are, and a deployment has no such place"
        )
    if settings.federation.dropout:
        raise BadInput("federation.dropout simulates what happens by itself in a deployment: leave it at 0")
    if settings.privacy and settings.privacy.name == "example":
        raise BadInput(
            "privacy=example accounts for the size of each client's data, which a server does not know"
        )


def build_server(settings: CellConfig) -> Components:
    """What the server's cell is built of: with data of its own to score with, or with no image at all."""
    if "root" not in settings.data.source or settings.data.root:
        return build(settings)
    if settings.evaluation.samples:
        raise BadInput(
            "evaluation.samples needs images to compare with: start with data-root=FOLDER, or set it to 0"
        )
    shape = {"image_size": settings.data.image_size, "channels": settings.data.channels}
    source = {"_target_": "fedlight.data.elsewhere.load", **shape}
    data = settings.data.model_copy(update={"source": source, "limit": None})
    return build(settings.model_copy(update={"data": data, "partition": _own(settings.partition, None)}))


def build_institution(settings: CellConfig, client: int) -> Components:
    """What an institution's site is built of: all images of its folder are one client's.

    Without a folder of its own it takes the client's share of a public data set, as a simulation deals it.
    """
    if not 0 <= client < settings.clients:
        raise BadInput(f"clients are 0 to {settings.clients - 1}, got client={client}")
    if settings.data.root:
        settings = settings.model_copy(update={"partition": _own(settings.partition, client)})
    return build(settings)


def _own(partition: PartitionConfig, client: int | None) -> PartitionConfig:
    deal = {"_target_": "fedlight.data.partition.own", "client": client}
    return partition.model_copy(update={"deal": deal})


@dataclass(frozen=True)
class Institution:
    """Answers the server's messages for the one client of this place.

    Attributes:
        cell: id of the federation.
        client: its number.
        site: with its images and its memory.
        folder: of its memory.
    """

    cell: str
    client: int
    site: Site
    folder: Path

    @classmethod
    def make(cls, path: Path, agreed_to: str, client: int, root: str | None, memory: Path) -> "Institution":
        """Builds the site.

        Args:
            path: of the agreement.
            agreed_to: its SHA-256.
            client: the institution's number.
            root: its images.
            memory: the folder for what it keeps.

        Raises:
            BadInput: the agreement is another one, or cannot be followed here.
        """
        check_agreed(path, agreed_to)
        settings = agreed(path, root)
        cell = cell_id(settings.plain())
        folder = memory / cell
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(cell, client, build_institution(settings, client).site(folder), folder / CHECKPOINT)

    def answer(self, content: bytes) -> bytes:
        """The update, or the scores, that a message asks for; empty for a client that drops out.

        Raises:
            Damaged: this is no message for this client, or it asks for what does not leave it.
            MemoryLost: what the client kept is gone.
        """
        message = from_bytes(content)
        if not isinstance(message, Broadcast | Evaluation):
            raise Damaged(f"a server does not send {type(message).__name__}")
        if (message.cell, message.client) != (self.cell, self.client):
            raise Damaged(f"the message is for client {message.client} of {message.cell}")
        setup = self.site.setup
        method = setup.method.in_round(message.round, setup.slices.names)
        if isinstance(message, Evaluation):
            if method.evaluate != "clients":
                raise Damaged(f"{method.name} asks no client for scores")
            return to_bytes(self.site.evaluate(message))
        if undeclared := sorted(set(message.uplink).difference(method.uplink)):
            raise Damaged(f"{method.name} does not let {', '.join(undeclared)} leave")
        self._begin(fingerprint(content))
        receipt = self.site.update(message)
        return receipt.read() if receipt else b""

    def _begin(self, hash_: str) -> None:
        """Forgets finished updates where the server, having gone back, sends another broadcast."""
        noted = self.folder / "broadcast"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not noted.exists() or noted.read_text(encoding="utf-8") != hash_:
            self.site.outbox.restart()
            with atomic(noted) as temporary:
                temporary.write_text(hash_, encoding="utf-8")
