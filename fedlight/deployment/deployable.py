"""Which configurations can be deployed: checks of an agreement before anybody trains by it."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from fedlight.config import CellConfig, validate
from fedlight.data.class_names import published_classes
from fedlight.deployment.agreement import read_agreement
from fedlight.experiment.aggregation_checks import check_sections, check_sums
from fedlight.experiment.mechanisms import listed_nodes, make_participation
from fedlight.experiment.targets import check_targets
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.factories import make_algorithm
from fedlight.federation.transport.node_keys import check_fingerprint
from fedlight.runtime.errors import BadInput


def load_agreed_config(path: Path, root: str | None) -> CellConfig:
    """The configuration of an agreement, with the paths of this machine.

    Args:
        path: of the agreement.
        root: folder of this participant's images, or None.

    Raises:
        BadInput: it would run other code than that of fedlight, diffusers and torch, or cannot be deployed.
    """
    received = read_agreement(path, root)
    check_targets(received)
    config = validate(OmegaConf.create(received))
    check_deployable(config)
    return config


def check_deployable(config: CellConfig) -> None:
    """Rejects configurations that a federation between institutions cannot follow.

    Raises:
        BadInput: one place would have to see all images, clients fail on purpose, scores decide when to stop,
            the noise is drawn from the public seed, a sum would be of too few clients, an algorithm does not
            declare its auxiliary state, or the node keys are not one a client.
    """
    algorithm = make_algorithm(config.algorithm)
    if type(algorithm).report is not FedAvg.report and not algorithm.aux_like({"": torch.zeros(1)}):
        raise BadInput(
            f"algorithm={config.algorithm and config.algorithm.name} does not declare in aux_like what "
            "clients report, which the server must know to validate their updates: implement aux_like"
        )
    if config.method.pool:
        raise BadInput(
            f"method={config.method.name} trains where all images are, and a deployment has no such place: "
            "choose another method"
        )
    if config.federation.dropout:
        raise BadInput(
            f"federation.dropout={config.federation.dropout:g} simulates failing clients, which a deployment "
            "has by itself: leave it at 0"
        )
    if config.evaluation.downstream:
        raise BadInput(
            "evaluation.downstream=true compares with a classifier that is trained on all images, and a "
            "deployment has no place where these are: set it to false"
        )
    if config.evaluation.background:
        raise BadInput(
            "evaluation.background=true scores models where all of them are, and in a deployment each "
            "institution scores its own: set it to false"
        )
    if config.early_stopping:
        raise BadInput(
            "early_stopping would have models evaluated after other rounds than institutions agree on: make "
            "an agreement without it"
        )
    if config.trainer.fuse:
        raise BadInput(
            f"trainer.fuse={config.trainer.fuse} trains clients in one computation, and an institution "
            "trains its one client: leave it at null"
        )
    if config.privacy and config.privacy.name == "example":
        raise BadInput(
            "privacy=example accounts for the size of each client's data, which a server does not know: "
            "choose privacy=client"
        )
    if config.privacy and not config.privacy.secure_noise:
        raise BadInput(
            "privacy.secure_noise=false draws noise from the seed, which every participant knows and can "
            "subtract again: make an agreement without it (fedlight deploy init sets it to true)"
        )
    if config.aggregation:
        slices = tuple(config.model.slices)
        check_sections(config)
        check_sums(config, config.method.resolve(slices), make_participation(config), slices)
    if config.model.conditional and not agreed_classes(config):
        raise BadInput(
            "model.conditional=true needs the names of the classes, so that every institution gives them the "
            "same numbers: make an agreement with data.classes=[FIRST,SECOND,...]"
        )
    _check_nodes(config)


def agreed_classes(config: CellConfig) -> list[str] | None:
    """The class names by which all participants number their labels; None where they are not known.

    The names of a published data set are not part of a cell's id: in a simulation they are the same.
    """
    classes = config.data.only or config.data.classes or published_classes(config.data.source)
    return list(classes) if classes else None


def _check_nodes(config: CellConfig) -> None:
    """Raises BadInput where the agreement lists node keys, and not exactly one for each client."""
    nodes = listed_nodes(config)
    if nodes is None:
        return
    if not isinstance(nodes, list) or len(nodes) != config.clients or len(set(map(str, nodes))) != len(nodes):
        raise BadInput(
            f"transport.nodes must list {config.clients} fingerprints of keys, one for each client and no "
            "key twice"
        )
    for node in nodes:
        check_fingerprint(str(node))
