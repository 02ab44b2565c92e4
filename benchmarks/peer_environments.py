"""The environments of the frameworks that fedlight is compared with, made by uv in the cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("FEDLIGHT_CACHE", "~/.cache/fedlight")).expanduser() / "peers"
PYENV = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
WITH_FEDLIGHT = ("torch", "numpy", "diffusers", "safetensors")
"""Installed beside each framework, in the versions that fedlight runs with: what the UNet needs."""


@dataclass(frozen=True)
class Environment:
    """A framework's own environment.

    Attributes:
        name: of its folder in the cache.
        requirement: of the framework.
        module: that its worker imports.
        pythons: versions of Python as `uv python find` takes them, the best first; None is this Python.
    """

    name: str
    requirement: str
    module: str
    pythons: tuple[str | None, ...] = (None,)


FLOWER = Environment("flower", "flwr[simulation]==1.42.0", "flwr.simulation, ray")
PFL = Environment("pfl", "pfl==0.6.0", "pfl.model.pytorch")
BLAZEFL = Environment("blazefl", "blazefl==2.0.3", "blazefl.contrib", ("3.13", "3.12"))
"""The last version for a Python with a global interpreter lock; from 3.0 on BlazeFL needs Python 3.14."""


class Missing(Exception):
    """An environment cannot be made on this machine; the message says why."""


def python_of(environment: Environment) -> Path:
    """The interpreter of an environment, which is made first if it is missing.

    Raises:
        Missing: uv, or a Python of that version, is not there, or the installation failed.
    """
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if uv is None:
        raise Missing("uv is not installed (pip install uv)")
    base = _find_python(uv, environment.pythons)
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in WITH_FEDLIGHT]
    requirements = [environment.requirement, *pinned]
    key = hashlib.blake2b(repr((base, requirements)).encode(), digest_size=4).hexdigest()
    folder = CACHE / f"{environment.name}-{key}"
    python, complete = folder / "bin" / "python", folder / "complete"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            print(f"making {folder} ({environment.requirement}, {base})", file=sys.stderr)
            _run(uv, "venv", "--quiet", "--clear", "--python", base, str(folder))
            _run(uv, "pip", "install", "--quiet", "--python", str(python), *requirements)
            _run(str(python), "-c", f"import fedlight.diffusion.unet, {environment.module}")  # compiles them
            complete.touch()
    return python


def _find_python(uv: str, versions: tuple[str | None, ...]) -> str:
    for wanted in versions:
        if wanted is None:
            return str(Path(sys.executable).resolve())  # the same for all checkouts
        command = [uv, "python", "find", "--no-python-downloads", "--no-project", wanted]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if not done.returncode:
            return done.stdout.strip()
        if installed := sorted(PYENV.glob(f"versions/{wanted}.*/bin/python")):  # uv does not look there
            return str(installed[-1])
    raise Missing(f"no Python {' or '.join(filter(None, versions))} (uv python install {versions[0]})")


def _run(*command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise Missing(f"{' '.join(command[:3])}: {done.stderr.strip().splitlines()[-1]}")
