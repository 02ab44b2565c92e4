"""What the configuration of a stored cell may call when the cell is opened."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from diffusers import ModelMixin, SchedulerMixin
from torch.nn import Module
from torch.optim import Optimizer

from fedlight.runtime.errors import BadInput

OWN = ("fedlight.data", "fedlight.diffusion", "fedlight.federation", "fedlight.loggers")
LIBRARIES = ("diffusers", "torch.optim", "torch.nn")
KINDS = (ModelMixin, SchedulerMixin, Optimizer, Module)
"""Classes of the libraries whose constructors build and do nothing else."""


def check_targets(config: Any) -> None:
    """Checks every `_target_` of a configuration, at any depth, before anything of it is made.

    Allowed are classes and functions of fedlight that a configuration is made for, and models, schedulers,
    layers and optimizers of diffusers and torch. What counts is where the thing itself is defined, not the
    path that leads to it.

    Raises:
        BadInput: something else would be run; the message names it.
    """
    for key, value in _strings(config):
        if "${" in value:
            raise BadInput(f"{key} would be computed from '{value}'")
        if key.rpartition(".")[2] == "_target_" and not _is_allowed(value):
            raise BadInput(f"{key} would run {value}")


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a configuration, keys included, with the dotted key where it stands."""
    if isinstance(node, dict):
        for name, value in node.items():
            inner = f"{key}.{name}".lstrip(".")
            yield key, str(name)
            yield from _strings(str(value) if name == "_target_" and value else value, inner)
    elif isinstance(node, list | tuple):
        for position, value in enumerate(node):
            yield from _strings(value, f"{key}.{position}".lstrip("."))
    elif node is not None:
        yield key, str(node)


def _is_allowed(path: str) -> bool:
    found = _resolve(path) if path.startswith(tuple(f"{p}." for p in (*OWN, *LIBRARIES))) else None
    if found is None or "." in getattr(found, "__qualname__", "."):
        return False
    if _is_in(found.__module__, OWN):
        return True
    return isinstance(found, type) and _is_in(found.__module__, LIBRARIES) and issubclass(found, KINDS)


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return f"{module}.".startswith(tuple(f"{package}." for package in packages))


def _resolve(path: str) -> Any:
    """What a dotted path leads to, or None; only modules of the package where it begins are imported."""
    package, *parts = path.split(".")
    found: Any = import_module(package)
    reached = package
    for part in parts:
        reached = f"{reached}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = import_module(reached)
            except ImportError:
                return None
    return found
