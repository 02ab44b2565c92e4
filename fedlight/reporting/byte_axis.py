"""An axis of bytes in the figures."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator


def scale_bytes(axis: Axes) -> None:
    """Makes the horizontal axis logarithmic, in bytes, with as many labels as fit."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    decades = np.log10(high / low)
    labelled = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)  # of a decade
    axis.xaxis.set_major_locator(LogLocator(subs=labelled, numticks=6))
    if decades < 0.5:
        axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.xaxis.set_major_formatter(EngFormatter("B"))
    axis.minorticks_off()
