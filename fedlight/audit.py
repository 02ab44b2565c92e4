"""Attacks a finished cell: python -m fedlight.audit runs/NAME/CELL [--client K] [--images N] [--clients N]"""

import json
import sys
from pathlib import Path
from typing import Any

from fedlight.runs.finished_arguments import finished_parser, refusing
from fedlight.runs.identity import read_result
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic


def main() -> None:
    """Exits with 0, with 2 for bad input, or with 1: predictions are not finite, or epsilon is refuted."""
    parser = finished_parser("audit", "Attacks a finished cell; writes audit.json into its folder.")
    parser.add_argument(
        "--images", type=int, default=1000, help="of each side, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--clients", type=int, default=2, help="whose updates are looked at (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides all draws (default: %(default)s)")
    asked = parser.parse_args()
    with refusing():
        if asked.images < 2:
            raise BadInput(f"--images must be 2 or more, got {asked.images}")
        broken = audit(asked.cell, asked.client, asked.images, asked.clients, asked.seed, asked.trust)
    if broken:
        print(f"fedlight: {broken}", file=sys.stderr)
        sys.exit(1)


def audit(folder: Path, client: int | None, images: int, clients: int, seed: int, trust: bool) -> str:
    """Attacks a finished cell, prints and stores what was found.

    Args:
        folder: of the cell.
        client: whose own model is attacked, or None for the federated one.
        images: trained on and held out, of each at most so many.
        clients: whose updates are looked at, at most.
        seed: decides all draws.
        trust: whether the cell's configuration may run whatever code it names.

    Returns:
        What refutes the cell's guarantee, or nothing.

    Raises:
        BadInput: no finished cell, or no such model.
    """
    from fedlight.experiment.attack import Attacker
    from fedlight.experiment.finished import open_cell

    found = Attacker(open_cell(folder, trust), images, clients, seed).report(client)
    stated = (read_result(folder) or {}).get("privacy")
    found["stated"] = stated
    with atomic(folder / "audit.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for attack in found["attacks"]:
        print(f"{attack['sees']}, {attack['attack']}: {_interval('AUC', attack['auc'])}, ", end="")
        print(_interval("TPR at 1 % FPR", attack["tpr_at_0.01"]), end=", ")
        print(_interval("at 0.1 %", attack["tpr_at_0.001"]), end=", ")
        print(f"epsilon at least {attack['epsilon_lower']:.2f}")
    print(f"{found['extraction']['suspect']:.1%} of generated images lie suspiciously near a training image")
    if "canaries" in found:
        print(f"canary clients: epsilon at least {found['canaries']['epsilon_lower']:.2f}")
    print(f"written to {folder / 'audit.json'}")
    return _broken(found, stated)


def _interval(name: str, figures: list[float]) -> str:
    value, low, high = figures
    return f"{name} {value:.3f} ({low:.3f} to {high:.3f})"


def _broken(found: dict[str, Any], stated: dict[str, Any] | None) -> str:
    """The lower bound that the stated guarantee does not allow, if there is one."""
    if stated is None:
        return ""
    bounds = found["attacks"] if stated["kind"] == "example" else [found["canaries"]]
    bound = max(one["epsilon_lower"] for one in bounds)
    if bound <= float(stated["epsilon"]):
        return ""
    return f"the guarantee is broken: epsilon is at least {bound:.2f}, and {stated['epsilon']} is stated"


if __name__ == "__main__":
    main()
