"""How many clients of a cell train in one computation (`trainer.fuse`)."""

from fedlight.config import CellConfig
from fedlight.diffusion.depthwise import use_stacked_layers
from fedlight.diffusion.sampling import BATCH
from fedlight.experiment.checks import check_fuse
from fedlight.experiment.drawing import images_per_model
from fedlight.experiment.parts import CellParts
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.cohort import cohort_size
from fedlight.runtime.errors import BadInput

AUTO = "auto"
LIMIT = 32  # clients in one computation; more of them were not faster
MEMORY = 2**30  # bytes that stacked weights, gradients and two moments may take in a process
SMALL_STEP = {"cpu": 5e8, "cuda": 2e10}
"""Floating-point operations of a client's step, up to which calls bound it, by the type of the device.

That of a CPU is measured (docs/performance.md); that of a GPU follows from its data sheet.
"""


def choose_fuse(parts: CellParts) -> int:
    """The number of clients of `trainer.fuse`; 1 where each trains alone.

    A number is that number, and refused where it cannot be done. `auto` is a function of the configuration
    and of the type of the device alone, and no measurement, so that a cell has the same bits in every run,
    for any number of workers, and after a restart.

    Args:
        parts: of the cell; the layers of the model are switched to the form that serves several clients.

    Raises:
        BadInput: `trainer.fuse` is a number, and clients cannot be fused.
    """
    config, model = parts.config, parts.model
    fuse = config.trainer.fuse
    if fuse is None:
        return 1
    number = fuse if isinstance(fuse, int) else _number_by_rule(parts)
    if fuse == AUTO and number == 1:
        return 1
    use_stacked_layers(model)
    try:
        check_fuse(config, model, parts.algorithm, parts.device, parts.denoised_shape)
    except BadInput:
        if fuse != AUTO:
            raise
        use_stacked_layers(model, False)
        return 1
    return number


def _number_by_rule(parts: CellParts) -> int:
    """Half a cohort, up to LIMIT clients that fit in MEMORY, where a step is small; otherwise 1."""
    config = parts.config
    model_bytes = sum(tensor.nbytes for tensor in parts.model.state_dict().values())
    cohort = cohort_size(len(parts.training_indices), config.fraction)
    number = min(LIMIT, -(-cohort // 2), MEMORY // (4 * model_bytes))
    if number < 2:
        return 1
    operations = parts.largest_batch * parts.image_flops.training
    small = operations <= SMALL_STEP.get(parts.device.type, 0)
    return number if small else 1


def may_fuse_unequal(config: CellConfig, algorithm: FedAvg) -> bool:
    """Whether clients with different numbers of batches may train in one computation.

    They may not where a client steps after its last batch regardless of `accumulate_grad_batches`, which the
    others would not; where optimizers are kept, whose step counts differ then; and where callbacks of an
    algorithm need all clients in every step.

    Args:
        config: of the cell.
        algorithm: of the cell.
    """
    accumulates = (config.trainer.model_extra or {}).get("accumulate_grad_batches", 1) != 1
    leave = type(algorithm).callbacks is FedAvg.callbacks or algorithm.clients_leave
    return leave and not (accumulates or config.method.keep_optimizer)


def choose_drawn_together(parts: CellParts) -> int:
    """From how many clients' own models images are drawn in one computation; 1 where from one after another.

    As many as are trained in one, where so few images are drawn from each that calls bound a denoising step,
    which costs a third of a training step. Like `choose_fuse` it is no measurement.
    """
    config = parts.config
    images = min(images_per_model(config), BATCH)
    if parts.fuse == 1 or config.method.evaluate != "clients" or not images:
        return 1
    calls = 2 if config.model.conditional and config.evaluation.guidance != 1 else 1
    operations = images * calls * parts.image_flops.denoising
    return parts.fuse if operations <= SMALL_STEP.get(parts.device.type, 0) / 3 else 1
