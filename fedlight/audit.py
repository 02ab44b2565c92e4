"""Attacks a finished cell: python -m fedlight.audit runs/NAME/CELL [--client K] [--images N] [--clients N]"""

import json
import sys
from pathlib import Path
from typing import Any

from fedlight.command import cell_parser, run_command
from fedlight.runs.identity import read_result
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic


def main() -> None:
    """Exits with 0, with 2 for bad input, or with 1: predictions are not finite, or epsilon is refuted."""
    parser = cell_parser("audit", "Attacks a finished cell; writes audit.json into its folder.")
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="maximum number of members and of non-members (default: %(default)s)",
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=2,
        help="maximum number of clients whose updates are attacked (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random draws (default: %(default)s)")
    sys.exit(run_command(parser, audit))


def audit(cell: Path, client: int | None, images: int, clients: int, seed: int, trust: bool) -> int:
    """Attacks a finished cell; prints the results and stores them in its `audit.json`.

    Args:
        cell: its folder.
        client: whose own model is attacked, or None for the federated one.
        images: maximum number of members (training images) and of non-members, 2 or more.
        clients: maximum number of clients whose updates are attacked.
        seed: of all random draws.
        trust: whether the cell's configuration may run whatever code it names.

    Returns:
        1 where the attacks refute the cell's guarantee, else 0.

    Raises:
        BadInput: no finished cell, no such model, or too few images.
    """
    if images < 2:
        raise BadInput(f"--images must be 2 or more, got {images}")
    from fedlight.experiment.attack import Attacker
    from fedlight.experiment.finished import open_cell

    report = Attacker(open_cell(cell, trust), images, clients, seed).report(client)
    guarantee = report["stated"] = (read_result(cell) or {}).get("privacy")
    with atomic(cell / "audit.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for attack in report["attacks"]:
        print(f"{attack['sees']}, {attack['attack']}: {_interval('AUC', attack['auc'])}, ", end="")
        print(_interval("TPR at 1 % FPR", attack["tpr_at_0.01"]), end=", ")
        print(_interval("at 0.1 %", attack["tpr_at_0.001"]), end=", ")
        print(f"epsilon at least {attack['epsilon_lower']:.2f}")
    print(f"{report['extraction']['suspect']:.1%} of generated images lie suspiciously near a training image")
    if "canaries" in report:
        print(f"canary clients: epsilon at least {report['canaries']['epsilon_lower']:.2f}")
    print(f"written to {cell / 'audit.json'}")
    if refuted := _refute(report, guarantee):
        print(f"fedlight: {refuted}", file=sys.stderr)
        return 1
    return 0


def _interval(name: str, figures: list[float]) -> str:
    value, low, high = figures
    return f"{name} {value:.3f} ({low:.3f} to {high:.3f})"


def _refute(report: dict[str, Any], guarantee: dict[str, Any] | None) -> str:
    """A lower bound of epsilon that exceeds the stated guarantee, in words; empty where there is none."""
    if guarantee is None:
        return ""
    bounds = report["attacks"] if guarantee["kind"] == "example" else [report["canaries"]]
    bound = max(attack["epsilon_lower"] for attack in bounds)
    if bound <= float(guarantee["epsilon"]):
        return ""
    return f"the guarantee is broken: epsilon is at least {bound:.2f}, and {guarantee['epsilon']} is stated"


if __name__ == "__main__":
    main()
