"""The dashboard on Weights & Biases: python -m fedlight.dashboard --entity E --project P [--out FILE]"""

import argparse
import json
import os
import sys
from pathlib import Path

from fedlight.command import run_command
from fedlight.loggers.wandb_mode import wandb_mode
from fedlight.runtime.environment import load_environment
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, or with 2 for bad input and where the service refuses."""
    parser = argparse.ArgumentParser(
        prog="python -m fedlight.dashboard",
        description="Builds a workspace and a report of a project's cells on Weights & Biases: quality "
        "against exchange, curves over rounds, the spread over clients, samples, the table of cells. With "
        "--out their specification is written to a file and nothing is sent.",
    )
    parser.add_argument("--entity", help="default: WANDB_ENTITY")
    parser.add_argument("--project", help="default: WANDB_PROJECT, else fedlight")
    parser.add_argument("--sweep", help="only the cells of this sweep (default: all of the project)")
    parser.add_argument("--out", type=Path, help="file for the specification; nothing is sent")
    sys.exit(run_command(parser, dashboard))


def dashboard(entity: str | None, project: str | None, sweep: str | None, out: Path | None) -> None:
    """Builds the dashboard; sends it, or writes its specification.

    Args:
        entity: the team or user that owns the project, or None for WANDB_ENTITY.
        project: its name, or None for WANDB_PROJECT, else fedlight.
        sweep: only the cells of this sweep, or None for all.
        out: file for the specification; with it nothing is sent.

    Raises:
        BadInput: no entity, no key of W&B, the service refuses, or the file cannot be written.
    """
    load_environment()
    entity = os.environ.get("WANDB_ENTITY") if entity is None else entity
    project = os.environ.get("WANDB_PROJECT", "fedlight") if project is None else project
    if not entity:
        raise BadInput("--entity is needed: the team or user that owns the project; or set WANDB_ENTITY")
    if not out and wandb_mode() != "online":
        raise BadInput(
            "W&B: no key, or WANDB_MODE says offline: set WANDB_API_KEY or type wandb login; or --out FILE "
            "writes the specification and sends nothing"
        )

    from fedlight.loggers.wandb_panels import build, publish, specification

    workspace, report = build(entity, project, sweep)
    if out:
        try:
            out.write_text(json.dumps(specification(workspace, report), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"--out: cannot write to {out}: {error.strerror}") from error
        print(f"dashboard: not sent; specification in {out}")
        return
    print("\n".join(f"dashboard: {url}" for url in publish(workspace, report)))


if __name__ == "__main__":
    main()
