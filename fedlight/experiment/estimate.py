"""The cost of a cell, estimated before it runs: optimizer steps, bytes exchanged and time."""

import os
from dataclasses import dataclass

from fedlight.diffusion.depthwise import use_stacked_layers
from fedlight.experiment.checks import check_fuse
from fedlight.experiment.expected_traffic import expected_traffic
from fedlight.experiment.flops import denoised_images
from fedlight.experiment.fusing import AUTO, LIMIT
from fedlight.experiment.parts import CellParts
from fedlight.experiment.scored_models import is_evaluation_round, scored_clients
from fedlight.experiment.step_time import alone_seconds, fused_seconds
from fedlight.federation.cohort import cohort_size
from fedlight.runtime.errors import BadInput

WORTH = 1.2  # times as fast, from which on fusing is suggested
MEMORY_SHARE = 0.25  # of the machine's memory that stacked weights, gradients and two moments may take


@dataclass(frozen=True)
class Estimate:
    """The cost of a cell from its first round to its last.

    Attributes:
        steps: optimizer steps of all clients.
        bytes: bytes exchanged in both directions, as `expected_traffic` says.
        seconds: training and sampling time on this machine.
    """

    steps: int
    bytes: int
    seconds: float


def estimate(parts: CellParts, taken: int = 0) -> Estimate:
    """Simulates the traffic of a cell and times one optimizer step.

    Args:
        parts: of the cell.
        taken: number of first rounds that cost nothing, since a shorter cell has them.
    """
    traffic = expected_traffic(parts, taken)
    return Estimate(traffic.steps, traffic.bytes, _seconds(parts, traffic.batches, taken))


def describe_fuse(parts: CellParts) -> str | None:
    """What `trainer.fuse=auto` picks, or which number would make steps faster here; None where none would."""
    if parts.config.trainer.fuse == AUTO:
        if parts.fuse == 1:
            return "trainer.fuse=auto trains each client alone"
        gain = _fused_gain(parts, parts.fuse)
        number = f"trainer.fuse=auto trains up to {parts.fuse} clients at once"
        return f"{number}, {gain:.1f} times as fast a step here"
    if suggestion := suggest_fuse(parts):
        fuse, gain = suggestion
        return f"trainer.fuse={fuse} would train {fuse} clients at once, {gain:.1f} times as fast a step"
    return None


def suggest_fuse(parts: CellParts) -> tuple[int, float] | None:
    """How many clients one computation should train here (`trainer.fuse`), from memory and a measured step.

    Returns:
        The number, which leaves a group to each process, and how many times as fast their steps are; None
        where the cell sets `trainer.fuse` or cannot, or where fusing is not worth it.
    """
    config = parts.config
    per_worker = -(-cohort_size(config.clients, config.fraction) // parts.max_workers)
    model_bytes = sum(tensor.nbytes for tensor in parts.model.state_dict().values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = int(MEMORY_SHARE * memory / parts.max_workers / (4 * model_bytes))
    fuse = min(LIMIT, per_worker, fitting)
    if config.trainer.fuse or parts.method.pool or fuse < 2:
        return None
    use_stacked_layers(parts.model)
    try:
        check_fuse(config, parts.model, parts.algorithm, parts.device, parts.denoised_shape)
    except BadInput:
        return None
    gain = _fused_gain(parts, fuse)
    return (fuse, gain) if gain > WORTH else None


def _fused_gain(parts: CellParts, fuse: int) -> float:
    """How many times as fast the steps of so many clients are in one computation, measured here."""
    return fuse * alone_seconds(parts) / fused_seconds(parts, fuse)


def _seconds(parts: CellParts, batches: int, taken: int) -> float:
    """The time of training and sampling, from that of one step, of which the forward pass is a third.

    Args:
        parts: of the cell.
        batches: of all clients that are trained on.
        taken: number of first rounds that cost nothing.
    """
    config = parts.config
    batch, cohort = parts.largest_batch, cohort_size(config.clients, config.fraction)
    per_image = alone_seconds(parts) / batch
    trained, groups = per_image, cohort
    if parts.fuse > 1 and not parts.method.pool:
        trained = fused_seconds(parts, parts.fuse) / (parts.fuse * batch)
        groups = -(-cohort // parts.fuse)
    models = len(scored_clients(config, frozenset())) if parts.method.evaluate == "clients" else 1
    evaluations = sum(is_evaluation_round(round_, config) for round_ in range(taken + 1, config.rounds + 1))
    forwards = evaluations * denoised_images(config, models)
    training = batches * config.data.batch_size * trained / min(parts.max_workers, groups)
    return training + forwards * per_image / 3 / min(parts.max_workers, cohort)
