"""What a cell promises about privacy: checked beforehand, and accounted after every round."""

from pathlib import Path
from typing import Any

from fedlight.config import CellConfig
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.mechanism import COUNT_NOISE, GaussianMechanism
from fedlight.federation.messages import State
from fedlight.federation.method import Method
from fedlight.federation.noise import SecretNoise, SeededNoise
from fedlight.privacy.account import Account, calibrate
from fedlight.runtime.errors import BadInput

RELEASES = "releases"  # in the checkpoint's folder: a byte for each release with secret noise


class Guarantee:
    """The account of a cell with client-level privacy.

    Args:
        settings: of the cell, with its noise.
        checkpoint: the folder of the checkpoint.
    """

    def __init__(self, settings: CellConfig, checkpoint: Path) -> None:
        assert settings.privacy is not None
        self._asked = settings.privacy
        self._account = Account(self._asked.noise, settings.fraction, self._asked.delta)
        self._notes = checkpoint / RELEASES

    def epsilon(self, round_: int) -> float:
        """What was spent up to a round; rounds that were done again with fresh noise count again."""
        noted = self._notes.stat().st_size if self._notes.exists() else 0
        return self._account.epsilon(max(round_, noted))

    def entry(self, epsilon: float) -> dict[str, Any]:
        """The `privacy` entry of `result.json`; an infinite epsilon is the word `inf`."""
        asked = self._asked
        return {
            "kind": asked.name,
            "epsilon": as_json(epsilon),
            "delta": asked.delta,
            "noise": asked.noise,
            "clip": as_json(asked.clip),
            "noise_at": asked.noise_at,
        }


def as_json(number: float) -> float | str:
    """The number, or `inf`, which JSON has no number for."""
    return "inf" if number == float("inf") else number


def with_noise(settings: CellConfig) -> CellConfig:
    """The settings with the noise that `privacy.target_epsilon` asks for."""
    asked = settings.privacy
    if asked is None or asked.target_epsilon is None or not settings.rounds:
        return settings
    noise = calibrate(asked.target_epsilon, asked.delta, settings.fraction, settings.rounds)
    return settings.model_copy(update={"privacy": asked.model_copy(update={"noise": noise})})


def make_mechanism(settings: CellConfig, checkpoint: Path | None = None) -> GaussianMechanism | None:
    """How updates are clipped and noised; None where they are not.

    Args:
        settings: of the cell, with its noise.
        checkpoint: the folder where the server notes its releases.
    """
    asked = settings.privacy
    if asked is None:
        return None
    secret = SecretNoise(checkpoint / RELEASES if checkpoint else None)
    return GaussianMechanism(
        asked.clip,
        asked.noise,
        settings.clients,
        settings.fraction * settings.clients,
        asked.noise_at == "clients",
        asked.clip_quantile,
        secret if asked.secure_noise else SeededNoise(settings.seed),
    )


def check_privacy(settings: CellConfig, method: Method, algorithm: FedAvg, theta: State) -> None:
    """Refuses what would break the promise.

    Args:
        settings: of the cell.
        method: resolved over the slices.
        algorithm: of the cell.
        theta: the first global model, as far as clients report it.

    Raises:
        BadInput: client-level privacy does not go with something else that was asked for.
    """
    asked = settings.privacy
    if asked is None:
        return
    unsent = [slice_ for slice_ in method.uplink if slice_ not in method.downlink]
    whole = [name for name, tensor in theta.items() if not tensor.is_floating_point()]
    silent = type(algorithm).report is not FedAvg.report and not algorithm.extras_like(theta)
    at_clients, adaptive = asked.noise_at == "clients", asked.clip_quantile is not None
    most = 2 * COUNT_NOISE * settings.fraction * settings.clients  # noise that leaves the count its share
    reasons = {
        "a method whose clients report: CENTRAL and LOCAL have none": method.pool or not method.uplink,
        "a method whose clients all report the same: a deal of slices shows who takes part": method.split,
        f"a method that sends down what clients report: {', '.join(unsent)} is not": unsent,
        f"floating tensors: {', '.join(whole)} holds whole numbers, which noise cannot hide": whole,
        "an algorithm that tells beforehand what clients report beside the slices": silent,
        "a finite privacy.clip, or privacy.noise=0": asked.noise and asked.clip == float("inf"),
        "privacy.noise_at=server where a transform encodes updates": at_clients and settings.transform,
        "privacy.noise_at=server for an adaptive clip": at_clients and adaptive,
        f"noise below {most:.3g} for an adaptive clip in cohorts so small": adaptive and asked.noise >= most,
    }
    for needed, broken in reasons.items():
        if broken:
            raise BadInput(f"privacy={asked.name} needs {needed}")
