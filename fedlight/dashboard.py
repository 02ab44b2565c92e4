"""The dashboard on Weights & Biases: python -m fedlight.dashboard --entity E --project P [--out FILE]"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from fedlight.loggers.wandb_mode import wandb_mode
from fedlight.runtime.environment import load_environment, replace_unencodable
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, or with 2 where the service refuses."""
    replace_unencodable()
    load_environment()
    parser = argparse.ArgumentParser(
        prog="python -m fedlight.dashboard",
        description="Builds a workspace and a report of a project's cells on Weights & Biases: quality "
        "against exchange, curves over rounds, the spread over clients, samples, the table of cells. With "
        "--out their specification is written to a file and nothing is sent.",
    )
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="default: WANDB_ENTITY")
    parser.add_argument(
        "--project",
        default=os.environ.get("WANDB_PROJECT", "fedlight"),
        help="default: WANDB_PROJECT, else fedlight",
    )
    parser.add_argument("--sweep", help="only the cells of this sweep (default: all of the project)")
    parser.add_argument("--out", type=Path, help="file for the specification; sends nothing")
    arguments = parser.parse_args()
    if not arguments.entity:
        refuse("--entity is needed: the team or user that owns the project; or set WANDB_ENTITY")
    if not arguments.out and wandb_mode() != "online":
        refuse(
            "W&B: no key, or WANDB_MODE says offline: set WANDB_API_KEY or type wandb login; or --out FILE "
            "writes the specification and sends nothing"
        )

    from fedlight.loggers.wandb_panels import build, publish, specification

    workspace, report = build(arguments.entity, arguments.project, arguments.sweep)
    if arguments.out:
        try:
            arguments.out.write_text(
                json.dumps(specification(workspace, report), indent=2) + "\n", encoding="utf-8"
            )
        except OSError as error:
            refuse(f"--out: cannot write to {arguments.out}: {error.strerror}")
        print(f"dashboard: not sent; specification in {arguments.out}")
        return
    try:
        urls = publish(workspace, report)
    except BadInput as error:
        refuse(str(error))
    print("\n".join(f"dashboard: {url}" for url in urls))


def refuse(message: str) -> NoReturn:
    """Prints an error in one line and exits with 2."""
    print(f"fedlight: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
