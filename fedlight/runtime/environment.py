"""A command's surroundings: the settings of `.env`, here or in the checkout, and the terminal's encoding."""

import os
import re
import sys
from io import StringIO, TextIOWrapper
from pathlib import Path

from dotenv.main import DotEnv

CHECKOUT = Path(__file__).parents[2]
OURS = re.compile(r"(FEDLIGHT|WANDB)_\w+")
PATHS = re.compile(r"FEDLIGHT_(CACHE|FMNIST|CIFAR10|CELEBA|INCEPTION)|WANDB_(\w+_)?DIR|TORCH_HOME|HF_HOME")


def load_environment() -> None:
    """Sets what the two files hold and the environment lacks; a file of another user is left out.

    An empty value in a file, and an empty variable FEDLIGHT_... or WANDB_..., count as unset. In variables
    that are paths, `~` is the home folder.
    """
    for name in [name for name, value in os.environ.items() if OURS.fullmatch(name) and not value.strip()]:
        del os.environ[name]
    for folder in dict.fromkeys((Path.cwd(), CHECKOUT)):
        for name, value in _read(folder / ".env").items():
            if value and value.strip():
                os.environ.setdefault(name, value)
    for name, value in os.environ.items():
        if PATHS.fullmatch(name):
            os.environ[name] = os.path.expanduser(value)


def replace_unencodable() -> None:
    """Makes stdout and stderr print a replacement for a character that the locale's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _read(path: Path) -> dict[str, str | None]:
    """The variables of a file; none, with a message on stderr, where it is not to be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            if os.fstat(file.fileno()).st_uid == os.getuid():
                return dict(DotEnv(None, StringIO(file.read()), override=False).dict())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        print(f"fedlight: {path} cannot be read ({error})", file=sys.stderr)
        return {}
    print(f"fedlight: {path} belongs to another user and is not read", file=sys.stderr)
    return {}
