"""What a server asks of one client, and what may come back."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from torch import Tensor

from fedlight.compose import register_resolvers
from fedlight.config import CellConfig, validate
from fedlight.evaluation import scores
from fedlight.federation.messages import (
    Payload,
    Scores,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def config(*arguments: str) -> CellConfig:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return validate(compose("config", ["method=UDEC", "evaluation.grid=4", *arguments]))


METRICS = {"fid": 1.0, **dict.fromkeys(scores.metric_names("classifier"), 0.5)}


def drawn(metrics: dict[str, float], **groups: dict[str, Tensor]) -> Scores:
    return Scores(1, "0" * 64, metrics, {name: Payload.plain(tensors) for name, tensors in groups.items()})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
