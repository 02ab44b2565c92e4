"""The configuration of a cell, composed by Hydra from the files of configs/ and sweeps/."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf, open_dict

from fedlight.data.data_name import data_name
from fedlight.evaluation.weights import given_weights, weights_name
from fedlight.finetuning.pretrained_files import find_pretrained, pretrained_sha256
from fedlight.manual import format_manual
from fedlight.overrides import keep_text
from fedlight.runtime.secret import NESTED

PACKAGE = Path(__file__).parent
SETTINGS = PACKAGE / "settings"  # where a wheel carries the folders configs and sweeps
ROOT = SETTINGS if SETTINGS.is_dir() else PACKAGE.parent
"""The folder that holds configs and sweeps."""


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The configuration of one cell, not yet validated.

    Args:
        overrides: KEY=VALUE, as on the command line.
        config_dir: folder of further configuration files; None for none.

    Raises:
        HydraException, OmegaConfBaseException: they cannot be applied.
    """
    config = compose_command(overrides, config_dir)
    with open_dict(config):
        del config["hydra"]
    return config


def compose_command(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """As `compose_config`, with Hydra's own part of the configuration under the key hydra."""
    register_resolvers()
    keys = keep_text(overrides)
    if config_dir is not None:
        folders = [f"file://{folder}" for folder in (ROOT, config_dir.absolute())]
        keys.append(f"hydra.searchpath=[{','.join(map(_quote, folders))}]")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", overrides=keys, return_hydra_config=True)


def _quote(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def register_resolvers() -> None:
    """Registers the resolvers that `configs/` refers to with OmegaConf."""
    data_name.cache_clear()  # files may have changed since an earlier command of this process
    find_pretrained.cache_clear()
    resolvers: dict[str, Callable[..., Any]] = {
        "fedlight.manual": lambda: format_manual(ROOT).replace("$", "$$"),
        "fedlight.root": lambda: str(ROOT),
        "fedlight.home": _expand_home,
        "fedlight.data_name": lambda kind, root, cache: data_name(
            kind, _expand_home(root), _expand_home(cache)
        ),
        "fedlight.weights": lambda extractor: given_weights(str(extractor)),
        "fedlight.weights_name": lambda extractor, path: weights_name(extractor, _expand_home(path)),
        "fedlight.pretrained_sha256": lambda pretrained, cache: pretrained_sha256(
            _expand_home(pretrained), _expand_home(cache)
        ),
        NESTED: _decode_variable,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def _expand_home(path: Any) -> Any:
    """A path with the home folder in place of `~`; the schema rejects other values than text."""
    return os.path.expanduser(path) if isinstance(path, str) else path


def _decode_variable(name: str) -> Any:
    """The list or mapping that an environment variable holds, as on Hydra's command line."""
    return OmegaConf.create({"value": f"${{oc.decode:${{oc.env:{name}}}}}"})["value"]
