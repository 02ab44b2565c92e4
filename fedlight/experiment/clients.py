"""Where the clients of a cell train: their site in a process, and the transport that reaches them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning import Callback

from fedlight.config import CellConfig
from fedlight.data.client_data import ClientData, Sampling
from fedlight.experiment.fusing import choose_drawn_together, may_fuse_unequal
from fedlight.experiment.mechanisms import make_mechanism, make_private_training
from fedlight.experiment.model_evaluation import check_scores
from fedlight.experiment.parts import CHECKPOINT, CellParts
from fedlight.experiment.setup import set_up
from fedlight.federation.client import ClientSetup
from fedlight.federation.learning_rate import rate
from fedlight.federation.server import Server
from fedlight.federation.site import Site
from fedlight.federation.trainer import limit_batches
from fedlight.federation.transport.inline import Inline
from fedlight.federation.transport.processes import Processes
from fedlight.federation.transport.transport import Deployment, Monitor, Transport, TransportContext
from fedlight.runtime.extension import make_extension
from fedlight.runtime.usage import UsageLog


def make_site(
    parts: CellParts,
    folder: Path,
    callbacks: Sequence[Callback] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Site:
    """The site of this process, where clients of the cell train.

    Args:
        parts: of the cell.
        folder: of the cell.
        callbacks: of every client's Trainer, beside the Federator.
        on_step: called after every denoising step; it may end the cell by an exception.
    """
    config, optimizer = parts.config, parts.config.optimizer
    pixels, labels = parts.training_data()
    client_indices = parts.training_indices
    private_training = make_private_training(config, parts.noise, client_indices, folder / CHECKPOINT)
    poisson: Sampling | None = None
    if private_training and config.privacy:
        poisson = "secret" if config.privacy.secure_noise else "seeded"

    setup = ClientSetup(
        seed=config.seed,
        module=parts.model,
        slices=parts.slices,
        method=parts.method,
        algorithm=parts.algorithm,
        codec=parts.codec,
        data=lambda client: ClientData(
            pixels, client_indices[client], config.data.batch_size, labels, poisson
        ),
        make_trainer=lambda own: parts.make_trainer(callbacks=[*own, *callbacks, *parts.frozen_bf16]),
        evaluate=partial(parts.model_evaluator.evaluate_clients, on_step=on_step),
        rate=partial(rate, rounds=config.rounds, warmup=optimizer.warmup, cosine=optimizer.decay == "cosine"),
        fuse=parts.fuse,
        fuse_unequal=may_fuse_unequal(config, parts.algorithm),
        epoch_batches=partial(limit_batches, config.trainer),
        drawn_together=choose_drawn_together(parts),
        privacy=make_mechanism(config, parts.noise),
        secure=parts.aggregation,
        private_training=private_training,
        drawing=parts.drawing,
        ranks=parts.ranks,
    )
    return Site(folder.name, setup, folder / CHECKPOINT)


@dataclass(frozen=True)
class SiteMaker:
    """Makes the site of a cell in another process of this machine; can be pickled."""

    config: CellConfig
    folder: Path
    noise: float

    def __call__(self) -> Site:
        return make_site(set_up(self.config, noise=self.noise), self.folder)


def make_transport(
    parts: CellParts,
    folder: Path,
    site: Site,
    server: Server,
    monitor: Monitor,
    exit_stack: ExitStack,
    deployment: Deployment | None = None,
    usage: UsageLog | None = None,
) -> Transport:
    """The transport of the cell; CENTRAL trains in the process of the server."""
    config = parts.config
    context = TransportContext(
        site,
        SiteMaker(config, folder.absolute(), parts.noise),
        parts.max_workers,
        server,
        monitor,
        exit_stack,
        check_scores=partial(check_scores, config=config),
        deployment=deployment,
        usage=usage or UsageLog(),
    )
    if parts.method.pool or config.rounds == 0:
        return Inline(context)
    if config.transport is None:
        return Processes(context)
    transport: Transport = make_extension("transport", config.transport.model_dump(by_alias=True), context)
    return transport
