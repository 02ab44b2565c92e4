"""Privacy accounting: epsilon after a number of releases, by dp-accounting (Renyi DP, arXiv 1908.10530)."""

import math
import sys
from typing import Any

from fedlight.runtime.errors import BadInput

MISSING_LIBRARIES = "privacy needs the libraries dp-accounting and opacus: pip install 'fedlight[privacy]'"
ORDERS = (*(1 + x / 5 for x in range(1, 25)), *range(6, 64), 72, 80, 96, 128, 192, 256, 512, 1024)  # of Renyi


class Account:
    """The privacy cost of releases of a Poisson-sampled Gaussian mechanism, under add/remove adjacency.

    The unit of privacy is one client or one image.

    Args:
        noise: standard deviation of the noise divided by the largest norm of a unit, 0 or more.
        rate: probability that a release includes a unit, in (0, 1].
        delta: of (epsilon, delta), in (0, 1).

    Raises:
        BadInput: dp-accounting is not installed.
    """

    def __init__(self, noise: float, rate: float, delta: float) -> None:
        self._accounting = _library()
        self._release = _release(self._accounting, noise, rate)
        self._noise = noise
        self._delta = delta

    def epsilon(self, releases: int) -> float:
        """Epsilon after a number of releases; infinite without noise."""
        if not releases:
            return 0.0
        if not self._noise:
            return math.inf
        accountant = self._accounting.rdp.RdpAccountant(ORDERS)
        accountant.compose(self._release, releases)
        return float(accountant.get_epsilon(self._delta))


def calibrate(target_epsilon: float, delta: float, rate: float, releases: int) -> float:
    """The smallest noise, to 1e-3, that keeps a number of releases within a target epsilon.

    It is 0 for an infinite target. The other arguments are those of `Account`.
    """
    if target_epsilon == math.inf:
        return 0.0
    accounting = _library()
    noise = accounting.calibrate_dp_mechanism(
        lambda: accounting.rdp.RdpAccountant(ORDERS),
        lambda noise: accounting.SelfComposedDpEvent(_release(accounting, noise, rate), releases),
        target_epsilon,
        delta,
        tol=1e-3,
    )
    return float(noise)


def _release(accounting: Any, noise: float, rate: float) -> Any:
    return accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.rdp
        from absl import logging
    except ImportError as error:
        raise BadInput(MISSING_LIBRARIES) from error
    # dp-accounting warns of orders that do not converge, and skips them: epsilon stays an upper bound
    logging.set_verbosity(logging.ERROR)
    # a later configuration of logging closes the handler's stream, which may be one that pytest captures
    logging.get_absl_handler().python_handler.setStream(sys.__stderr__)
    return dp_accounting
