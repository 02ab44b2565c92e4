"""All figures of a comparison, one message each."""

from fedlight.reporting.comparison import Comparison
from fedlight.reporting.exchange_figure import quality_exchange
from fedlight.reporting.leakage import roc
from fedlight.reporting.partition_figure import partitions
from fedlight.reporting.plots import Plot
from fedlight.reporting.privacy_cost import quality_epsilon
from fedlight.reporting.rounds_figure import (
    budget,
    epsilon_rounds,
    exchange_rounds,
    fid_rounds,
    train_loss_rounds,
)
from fedlight.reporting.seconds_figure import fid_seconds
from fedlight.reporting.spread_figure import client_spread

FIGURES = (
    quality_exchange,
    client_spread,
    budget,
    fid_seconds,
    fid_rounds,
    train_loss_rounds,
    exchange_rounds,
    partitions,
    quality_epsilon,
    epsilon_rounds,
    roc,
)
"""In the order of the page."""


def make_plots(comparison: Comparison, prefix: str) -> list[Plot]:
    """Every figure for which the comparison has numbers; names of files begin with `prefix`."""
    plots = [make(comparison, prefix) for make in FIGURES]
    return [plot for plot in plots if not plot.data.empty]
