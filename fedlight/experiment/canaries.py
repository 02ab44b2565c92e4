"""An audit of client-level privacy: canary clients pass through a cell's mechanism, server and cohorts."""

import numpy as np
import torch
from numpy.typing import NDArray

from fedlight.config import CellConfig
from fedlight.experiment.guarantee import make_mechanism, make_participation
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.codec import Codec
from fedlight.federation.messages import Payload, State, Update
from fedlight.federation.method import Method
from fedlight.federation.server import Server
from fedlight.federation.slices import SliceMap

CANARIES = 1000  # at most
FEWEST = 100
SIZE = 10_000  # scalars of the model: canaries of random directions hardly meet in so many
SLICE, NAME = "canary", "canary.direction"


def canary_scores(config: CellConfig, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far the final model went in the direction of each canary (arXiv 2302.03098).

    Half of the canaries are clients, each of which reports its own random direction, ten times the clip, in
    every round that it takes part in; the model is that of the last round less the first. Nobody else is
    there, as if the attacker knew all other clients. At a large delta fewer canaries prove more: what the
    lower bound allows for delta grows with their number (arXiv 2305.08846, theorem 3.1).

    Args:
        config: of a cell with client-level privacy; its noise, clip, cohorts and rounds count.
        seed: decides canaries and noise.

    Returns:
        Scores of the canaries that took part and of those that did not.
    """
    assert config.privacy is not None
    clip = config.privacy.clip
    canaries = round(min(CANARIES, max(FEWEST, 0.1 / config.privacy.delta)))
    config = config.model_copy(update={"clients": canaries, "seed": seed})
    rng = np.random.default_rng(seed)
    included = rng.random(canaries) < 0.5
    directions = rng.standard_normal((canaries, SIZE)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    loud = 10 * (clip if np.isfinite(clip) else 1.0)

    mechanism = make_mechanism(config)
    assert mechanism is not None
    method = Method(name="CANARY", downlink=(SLICE,), uplink=(SLICE,), evaluate="global")
    server = Server(
        "canaries",
        method,
        SliceMap({SLICE: (NAME,)}),
        {NAME: torch.zeros(SIZE)},
        make_participation(config),
        FedAvg(),
        Codec(),
        privacy=mechanism,
    )
    for round_ in range(1, config.rounds + 1):
        for broadcast in server.start_round():
            if not included[broadcast.client]:
                continue
            values: State = {NAME: server.theta[NAME] + loud * torch.from_numpy(directions[broadcast.client])}
            if mechanism.at_clients:
                values, _ = mechanism.share(values, {}, server.theta, round_, broadcast.client)
            payloads = {SLICE: Payload.plain(values)}
            server.receive(Update("canaries", round_, broadcast.client, 0, None, payloads))
        server.finish_round()
    scores = directions.astype(np.float64) @ server.theta[NAME].double().numpy()
    return scores[included], scores[~included]
