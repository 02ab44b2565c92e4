"""A cell between institutions: what the server runs, and what each institution answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from fedlight.config import CellConfig, validate
from fedlight.data.class_names import published_classes
from fedlight.data.dataset import Dataset
from fedlight.data.loading import load, print_notes
from fedlight.data.partition import assign_all_to
from fedlight.data.placeholder import no_images
from fedlight.deployment.agreement import agreed_hash, check_agreed, read_agreement
from fedlight.deployment.answers import Answers
from fedlight.deployment.terms import Terms
from fedlight.experiment.cell import run_cell
from fedlight.experiment.clients import make_site
from fedlight.experiment.parts import CHECKPOINT, CellParts
from fedlight.experiment.setup import set_up
from fedlight.experiment.targets import check_targets
from fedlight.federation.admission import check_broadcast, check_evaluation
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.factories import make_algorithm
from fedlight.federation.messages import Broadcast, Evaluation, from_bytes, to_bytes
from fedlight.federation.site import Site
from fedlight.federation.transport.node_keys import check_fingerprint
from fedlight.federation.transport.transport import Deployment
from fedlight.runs.identity import cell_folder, cell_id
from fedlight.runtime.errors import BadInput, Damaged
from fedlight.runtime.lease import acquire_lease

MODELS = 2  # versions of the global slices that a client scores after a round: it may be made once more


def serve(grid: Any, path: Path, run_config: dict[str, Any]) -> None:
    """Runs the cell of an agreement inside a Flower ServerApp.

    Args:
        grid: Flower's way to the nodes.
        path: of the agreement.
        run_config: `output`, the folder for the cell's folder; `data-root`, images of the server's own to
            score with, or nothing.
    """
    config = agreed(path, str(run_config["data-root"]) or None)
    config = config.model_copy(update={"output": str(run_config["output"])})
    folder = cell_folder(config)
    with acquire_lease(folder) as lease:
        run_cell(config, lease, set_up_server, Deployment(grid, agreed_hash(path)))


def agreed(path: Path, root: str | None) -> CellConfig:
    """The settings of an agreement, on this machine.

    Raises:
        BadInput: it would run other code than that of fedlight, diffusers and torch, or cannot be deployed.
    """
    received = read_agreement(path, root)
    check_targets(received)
    config = validate(OmegaConf.create(received))
    check_deployable(config)
    return config


def check_deployable(config: CellConfig) -> None:
    """Raises BadInput for what needs one place that sees all images, clients that fail on purpose, or noise
    that is no secret; and for node keys that are not one a client.
    """
    algorithm = make_algorithm(config.algorithm)
    if type(algorithm).report is not FedAvg.report and not algorithm.aux_like({"": torch.zeros(1)}):
        raise BadInput(
            f"algorithm={config.algorithm and config.algorithm.name} does not say by extras_like what "
            "clients report, and the server must know it to refuse what does not fit"
        )
    if config.method.pool:
        raise BadInput(
            f"method={config.method.name} trains where all images are, and a deployment has no such place"
        )
    if config.federation.dropout:
        raise BadInput("federation.dropout simulates what happens by itself in a deployment: leave it at 0")
    if config.privacy and config.privacy.name == "example":
        raise BadInput(
            "privacy=example accounts for the size of each client's data, which a server does not know"
        )
    if config.privacy and not config.privacy.secure_noise:
        raise BadInput(
            "privacy.secure_noise=false draws noise from the seed, which every participant knows and can "
            "subtract again: make an agreement without it (fedlight deploy init sets it to true)"
        )
    if config.model.conditional and not agreed_classes(config):
        raise BadInput(
            "model.conditional=true needs the names of the classes, so that every institution gives them the "
            "same numbers: make an agreement with data.classes=[FIRST,SECOND,...]"
        )
    _check_nodes(config)


def _check_nodes(config: CellConfig) -> None:
    """Raises BadInput where the agreement lists node keys, and not one for each client."""
    nodes = (config.transport.model_extra or {}).get("nodes") if config.transport else None
    if nodes is None:
        return
    if not isinstance(nodes, list) or len(nodes) != config.clients or len(set(map(str, nodes))) != len(nodes):
        raise BadInput(
            f"transport.nodes must list {config.clients} fingerprints of keys, one for each client and no "
            "key twice"
        )
    for node in nodes:
        check_fingerprint(str(node))


def agreed_classes(config: CellConfig) -> list[str] | None:
    """The names of the classes, which all participants number alike; None where they are not known.

    Those of a published data set are part of no cell's id: in a simulation they are the same.
    """
    classes = config.data.classes or published_classes(config.data.source)
    return list(classes) if classes else None


def load_local(config: CellConfig) -> Dataset:
    """The images of this machine, with the class numbers that all participants share."""
    dataset, classes = load(config.data), agreed_classes(config)
    return dataset.numbered_by(classes) if classes else dataset


def set_up_server(config: CellConfig) -> CellParts:
    """The parts of the server's cell: with data of its own to score with, or without any image."""
    if "root" not in config.data.source or config.data.root:
        return set_up(config, load_local(config))
    if config.evaluation.samples:
        raise BadInput(
            "evaluation.samples needs images to compare with: start with data-root=FOLDER, or set it to 0"
        )
    data = config.data
    dataset = no_images(data.image_size, data.channels, agreed_classes(config) or ["unknown"])
    return set_up(config, dataset, assign_all_to(dataset.train.labels, config.clients, None))


def set_up_institution(config: CellConfig, client: int) -> CellParts:
    """The parts of an institution's cell: all images of its folder belong to one client.

    Without a folder of its own it takes the images that a simulation assigns to the client, of a public data
    set.
    """
    if not 0 <= client < config.clients:
        raise BadInput(f"clients are 0 to {config.clients - 1}, got client={client}")
    dataset = load_local(config)
    if not config.data.root:
        return set_up(config, dataset)
    training = dataset.train.first(config.data.limit)
    return set_up(config, dataset, assign_all_to(training.labels, config.clients, client))


@dataclass(frozen=True)
class Institution:
    """Answers the server's messages for the one client of this place.

    What leaves is noted in `answers.json`, and bounded by the agreement: one update in each round, in order,
    of the slices that the agreement names for it; and scores where they are due. The same message gets the
    same bytes again, since a server that restarts may go back by one round.

    Attributes:
        cell: id of the federation.
        client: its number.
        site: with its images and its memory.
        folder: of its memory.
        terms: of the agreement.
    """

    cell: str
    client: int
    site: Site
    folder: Path
    terms: Terms

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
        config = agreed(path, root)
        cell = cell_id(config.plain())
        folder = memory / cell
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        parts = set_up_institution(config, client)
        print_notes(parts.dataset)
        terms = Terms.make(config, parts.method, tuple(parts.slices.names))
        return cls(cell, client, make_site(parts, folder), folder / CHECKPOINT, terms)

    def answer(self, content: bytes) -> bytes:
        """The update, or the scores, that a message asks for.

        Raises:
            Damaged: this is no message for this client, it asks for what the agreement does not provide for,
                or what it asks for has left already.
            MemoryLost: what the client kept is gone.
        """
        message = self.read(content)
        with Answers(self.folder).opened() as answers:
            if message.round < answers.last - 1:
                raise Damaged(
                    f"the server is in round {message.round}, and this node has answered round "
                    f"{answers.last}. A server that lost its results starts again; to let this node start "
                    f"again with it, move {self.folder.parent} elsewhere. What left before counts, too"
                )
            if isinstance(message, Broadcast):
                return self._update(message, content, answers)
            return self._scores(message, content, answers)

    def read(self, content: bytes) -> Broadcast | Evaluation:
        """The message, checked before anything is done or kept.

        Raises:
            Damaged: as `answer` does.
        """
        message, setup = from_bytes(content), self.site.setup
        if not isinstance(message, Broadcast | Evaluation):
            raise Damaged(f"a server does not send {type(message).__name__}")
        if (message.cell, message.client) != (self.cell, self.client):
            raise Damaged(f"the message is for client {message.client} of {message.cell}")
        if isinstance(message, Broadcast):
            self.terms.check_broadcast(message)
            check_broadcast(message, setup.first, setup.slices, setup.method, setup.codec, setup.algorithm)
        else:
            self.terms.check_evaluation(message)
            check_evaluation(message, setup.first, setup.slices)
        return message

    def _update(self, broadcast: Broadcast, content: bytes, answers: Answers) -> bytes:
        round_ = broadcast.round
        if (same := answers.repeat("update", round_, content)) is not None:
            return same
        if answers.count("update", round_):
            raise Damaged(f"round {round_} was answered already, and this is another broadcast of it")
        if round_ < answers.last:
            raise Damaged(f"round {answers.last} was answered already, and round {round_} comes before it")
        update, _ = self.site.train(broadcast)
        assert update, "the terms admit no client that drops out"
        return answers.add("update", round_, content, to_bytes(update))

    def _scores(self, request: Evaluation, content: bytes, answers: Answers) -> bytes:
        round_, kind = request.round, "images" if request.draw else "fingerprint"
        if (same := answers.repeat(kind, round_, content)) is not None:
            return same
        if (given := answers.count(kind, round_)) >= MODELS:
            raise Damaged(f"{kind} of {given} models left after round {round_} already")
        return answers.add(kind, round_, content, to_bytes(self.site.evaluate(request)))
