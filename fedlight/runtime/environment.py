"""Settings and keys of a site, from `.env` in the folder where the command is typed or in the checkout."""

import os
import sys
from pathlib import Path

from dotenv import load_dotenv

CHECKOUT = Path(__file__).parents[2]


def load_environment() -> None:
    """Sets what the two files hold and the environment lacks; a file of another user is left out."""
    for folder in dict.fromkeys((Path.cwd(), CHECKOUT)):
        path = folder / ".env"
        try:
            with path.open() as file:
                if os.fstat(file.fileno()).st_uid == os.getuid():
                    load_dotenv(stream=file)
                    continue
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            print(f"fedlight: {path} cannot be read ({error})", file=sys.stderr)
            continue
        print(f"fedlight: {path} belongs to another user and is not read", file=sys.stderr)
