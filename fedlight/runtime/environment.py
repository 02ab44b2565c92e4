"""The environment of a command: variables from `.env` files, and the encoding of the terminal."""

import os
import re
import sys
from io import StringIO, TextIOWrapper
from pathlib import Path

from dotenv import load_dotenv

CHECKOUT = Path(__file__).parents[2]
OURS = re.compile(r"(FEDLIGHT|WANDB)_\w+")
PATHS = re.compile(
    r"FEDLIGHT_(CACHE|FMNIST|CIFAR10|CELEBA|INCEPTION|DINOV2|CLIP)|WANDB_(\w+_)?DIR|TORCH_HOME|HF_HOME"
)


def load_environment() -> None:
    """Sets the variables of `.env` in the working folder and in the checkout that are not set yet.

    A file of another user is not read. Empty values in a file are ignored; empty variables FEDLIGHT_... and
    WANDB_... of the environment are removed first. In variables that are paths, `~` is the home folder.
    """
    for name in [name for name, value in os.environ.items() if OURS.fullmatch(name) and not value.strip()]:
        del os.environ[name]
    for folder in dict.fromkeys((Path.cwd(), CHECKOUT)):
        before = set(os.environ)
        load_dotenv(stream=StringIO(_read(folder / ".env")))
        for name in os.environ.keys() - before:
            if not os.environ[name].strip():
                del os.environ[name]
    for name, value in os.environ.items():
        if PATHS.fullmatch(name):
            os.environ[name] = os.path.expanduser(value)


def replace_unencodable() -> None:
    """Makes stdout and stderr replace characters that the locale's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _read(path: Path) -> str:
    """The text of a file; empty, with a message on stderr, if it is unreadable or belongs to another user."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            if os.fstat(file.fileno()).st_uid == os.getuid():
                return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        print(f"fedlight: {path} cannot be read ({error})", file=sys.stderr)
        return ""
    print(f"fedlight: {path} belongs to another user and is not read", file=sys.stderr)
    return ""
