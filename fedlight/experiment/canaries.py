"""An audit of client-level privacy: canary clients report through a cell's mechanism, server and cohorts."""

import numpy as np
import torch
from numpy.typing import NDArray

from fedlight.config import CellConfig
from fedlight.experiment.mechanisms import make_mechanism, make_participation
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.codec import Codec
from fedlight.federation.messages import Payload, State, Update
from fedlight.federation.method import Method
from fedlight.federation.server import Server
from fedlight.federation.slices import SliceMap

MAX_CANARIES, MIN_CANARIES = 1000, 100
SIZE = 10_000  # scalars of the model: in so many dimensions random directions are almost orthogonal
BOOST = 10  # norm of a canary's update, in units of the clip
SLICE, NAME = "canary", "canary.direction"


def canary_scores(
    config: CellConfig, noise: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measures how far the final model moved in the direction of each canary (arXiv 2302.03098).

    Each canary has a random direction. Half of the canaries are clients, which report their direction, ten
    times the clip, in every round in which they take part. There are no other clients, which stands for an
    attacker who knows their updates. At a large delta fewer canaries give a larger lower bound on epsilon,
    since the bound's correction for delta grows with their number (arXiv 2305.08846, theorem 3.1). Secure
    aggregation is left out: half of the canaries are no clients, and would be fewer than a sum may have.

    Args:
        config: of a cell with client-level privacy; its clip, cohorts and rounds are used.
        noise: multiplier of the noise.
        seed: decides the canaries and the noise.

    Returns:
        The scores of the canaries that are clients, and of those that are not, float64.
    """
    assert config.privacy is not None
    clip = config.privacy.clip
    canaries = round(min(MAX_CANARIES, max(MIN_CANARIES, 0.1 / config.privacy.delta)))
    config = config.model_copy(update={"clients": canaries, "seed": seed, "aggregation": None})
    rng = np.random.default_rng(seed)
    included = rng.random(canaries) < 0.5
    directions = rng.standard_normal((canaries, SIZE)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    norm = BOOST * (clip if np.isfinite(clip) else 1.0)

    mechanism = make_mechanism(config, noise)
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
            values: State = {NAME: server.theta[NAME] + norm * torch.from_numpy(directions[broadcast.client])}
            if mechanism.at_clients:
                values, _ = mechanism.share(values, {}, server.theta, round_, broadcast.client)
            payloads = {SLICE: Payload.plain(values)}
            server.receive(Update("canaries", round_, broadcast.client, 0, None, payloads))
        server.finish_round()
    scores = directions.astype(np.float64) @ server.theta[NAME].double().numpy()
    return scores[included], scores[~included]
