"""All figures of a comparison, one message each."""

from dataclasses import replace

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
    fid_seconds,
    train_loss_rounds,
)
from fedlight.reporting.spread_figure import client_spread

FIGURES = (
    quality_exchange,
    budget,
    fid_seconds,
    client_spread,
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
    return [_name_what_is_drawn(plot) for plot in plots if not plot.data.empty]


def _name_what_is_drawn(plot: Plot) -> Plot:
    """A figure whose legend names no method that it does not show."""
    if "method" not in plot.data:
        return plot
    drawn = set(plot.data["method"])
    return replace(plot, legend={m: colour for m, colour in plot.legend.items() if m in drawn})
