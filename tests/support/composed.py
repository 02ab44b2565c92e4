"""A validated configuration of a cell."""

from hydra import compose, initialize_config_dir

from fedlight.compose import ROOT, register_resolvers
from fedlight.config import CellConfig, validate


def config(*arguments: str) -> CellConfig:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return validate(compose("config", ["data.limit=120", "evaluation.samples=0", *arguments]))
