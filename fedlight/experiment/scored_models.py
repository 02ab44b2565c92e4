"""Which models of a cell are evaluated, and after which rounds."""

from collections.abc import Set

from fedlight.config import CellConfig
from fedlight.runtime.seeds import stream


def is_evaluation_round(round_: int, config: CellConfig) -> bool:
    """Whether the models are evaluated after this round: the last one, and every `evaluation.every`-th."""
    every = config.evaluation.every
    return round_ == config.rounds or (every is not None and round_ % every == 0)


def scored_clients(config: CellConfig, trained: Set[int]) -> list[int]:
    """The clients whose own models are evaluated, in ascending order.

    The seed of the cell decides an order of preference, the same in every round; the first
    `evaluation.clients` that have trained are taken. Before any client has trained, every client qualifies,
    since all hold the first weights.

    Args:
        config: of the cell.
        trained: the clients that have reported an update so far.
    """
    number = config.clients
    if config.evaluation.clients != "all":
        number = min(config.evaluation.clients, config.clients)
    rng = stream(config.seed, "evaluation")
    preferred = rng.choice(config.clients, number, replace=False).tolist()
    others = rng.permutation(sorted(set(range(config.clients)).difference(preferred))).tolist()
    return sorted([k for k in (*preferred, *others) if not trained or k in trained][:number])
