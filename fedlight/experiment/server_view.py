"""What the server of a cell learns of updates, in words."""

from fedlight.config import CellConfig
from fedlight.experiment.aggregation_checks import planned_rounds
from fedlight.experiment.mechanisms import listed_nodes, make_participation
from fedlight.federation.secure.sum_sizes import smallest_sums


def describe_server_view(config: CellConfig) -> str:
    """What the server sees, such as `sums of at least 4 clients`; empty without secure aggregation.

    Args:
        config: of a cell that passed its checks.
    """
    if config.aggregation is None:
        return ""
    slices = tuple(config.model.slices)
    method, participation = config.method.resolve(slices), make_participation(config)
    plans = planned_rounds(config, method, participation, slices)
    fewest = [min(smallest_sums(plan, config.aggregation.threshold).values()) for _, plan in plans if plan]
    return f"sums of at least {min(fewest)} clients" if fewest else ""


def describe_signing(config: CellConfig) -> str:
    """Whether a server of institutions could replace the keys of masks; empty without secure aggregation.

    Args:
        config: of a cell that passed its checks.
    """
    if config.aggregation is None:
        return ""
    if listed_nodes(config):
        return "the keys of masks are signed by the nodes' keys, which the agreement lists"
    return (
        "the keys of masks are not signed: a server that replaces them sees single updates (with "
        "transport.nodes in the agreement they are signed)"
    )
