"""Membership inference: how well scores tell training images from held-out ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlight.privacy.lower_bound import lower_bound
from fedlight.runtime.errors import Diverged

RATES = (0.01, 0.001)  # false positive rates (arXiv 2112.03570)
RESAMPLES = 400
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Attack:
    """The scores that an attacker gives to images; a larger one says `member`.

    Attributes:
        sees: what the attacker sees.
        name: of the attack.
        members: scores of images that were trained on, shape (n,).
        others: scores of images that were held out, shape (m,).

    Raises:
        Diverged: a score is NaN, as of a model whose predictions are not finite; no rank follows from it.
    """

    sees: str
    name: str
    members: NDArray[np.float64]
    others: NDArray[np.float64]

    def __post_init__(self) -> None:
        if np.isnan(self.members).any() or np.isnan(self.others).any():
            raise Diverged(f"{self.sees}: predictions are not finite, so that {self.name} cannot rank images")

    def summary(self, delta: float) -> dict[str, Any]:
        """AUC and TPR with 95 % bootstrap intervals, the ROC, and the lower bound on epsilon that follows."""
        rng = np.random.default_rng(0)
        drawn = [
            _figures(rng.choice(self.members, len(self.members)), rng.choice(self.others, len(self.others)))
            for _ in range(RESAMPLES)
        ]
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        names = ["auc", *(f"tpr_at_{rate:g}" for rate in RATES)]
        figures = zip(names, _figures(self.members, self.others), low, high, strict=True)
        return {
            "sees": self.sees,
            "attack": self.name,
            "members": len(self.members),
            "others": len(self.others),
            **{name: [float(value), float(least), float(most)] for name, value, least, most in figures},
            "epsilon_lower": lower_bound(self.members, self.others, delta, CONFIDENCE),
            "roc": roc(self.members, self.others),
        }


def roc(members: NDArray[np.float64], others: NDArray[np.float64]) -> list[list[float]]:
    """Corners of the ROC, as false and true positive rates."""
    thresholds = np.unique(others)[::-1]
    return [
        *([float((scores > threshold).mean()) for scores in (others, members)] for threshold in thresholds),
        [1.0, 1.0],
    ]


def _figures(members: NDArray[np.float64], others: NDArray[np.float64]) -> list[float]:
    """AUC, and TPR at each of RATES."""
    ranked = np.sort(others)
    below, upto = np.searchsorted(ranked, members, "left"), np.searchsorted(ranked, members, "right")
    auc = float((below + upto).mean() / 2 / len(others))
    thresholds = [ranked[-1 - int(rate * len(ranked))] for rate in RATES]
    return [auc, *(float((members > threshold).mean()) for threshold in thresholds)]
