"""Membership inference: how well scores separate training images from held-out images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlight.privacy.lower_bound import lower_bound
from fedlight.runtime.errors import Diverged

RATES = (0.01, 0.001)  # false positive rates (arXiv 2112.03570)
RESAMPLES = 400  # of the bootstrap
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Attack:
    """The scores that an attacker assigns to images; larger scores indicate members of the training set.

    Attributes:
        observed: what the attacker observes, such as "released model".
        name: of the attack.
        members: scores of images that were trained on, shape (n,).
        others: scores of images that were held out, shape (m,).

    Raises:
        Diverged: a score is NaN, because the model's predictions are not finite.
    """

    observed: str
    name: str
    members: NDArray[np.float64]
    others: NDArray[np.float64]

    def __post_init__(self) -> None:
        if np.isnan(self.members).any() or np.isnan(self.others).any():
            raise Diverged(
                f"{self.observed}: predictions are not finite, so that {self.name} cannot rank images"
            )

    def summary(self, delta: float) -> dict[str, Any]:
        """AUC and TPR with 95 % bootstrap intervals, the ROC, and a lower bound on epsilon."""
        rng = np.random.default_rng(0)
        resampled = [
            _rates(rng.choice(self.members, len(self.members)), rng.choice(self.others, len(self.others)))
            for _ in range(RESAMPLES)
        ]
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        names = ["auc", *(f"tpr_at_{rate:g}" for rate in RATES)]
        rates = zip(names, _rates(self.members, self.others), low, high, strict=True)
        return {
            "sees": self.observed,
            "attack": self.name,
            "members": len(self.members),
            "others": len(self.others),
            **{name: [float(value), float(least), float(most)] for name, value, least, most in rates},
            "epsilon_lower": lower_bound(self.members, self.others, delta, CONFIDENCE),
            "roc": roc(self.members, self.others),
        }


def roc(members: NDArray[np.float64], others: NDArray[np.float64]) -> list[list[float]]:
    """The corners of the ROC as pairs of false and true positive rate."""
    thresholds = np.unique(others)[::-1]
    return [
        *([float((scores > threshold).mean()) for scores in (others, members)] for threshold in thresholds),
        [1.0, 1.0],
    ]


def _rates(members: NDArray[np.float64], others: NDArray[np.float64]) -> list[float]:
    """The AUC, and the TPR at each of RATES."""
    ranked = np.sort(others)
    below, upto = np.searchsorted(ranked, members, "left"), np.searchsorted(ranked, members, "right")
    auc = float((below + upto).mean() / 2 / len(others))
    thresholds = [ranked[-1 - int(rate * len(ranked))] for rate in RATES]
    return [auc, *(float((members > threshold).mean()) for threshold in thresholds)]
