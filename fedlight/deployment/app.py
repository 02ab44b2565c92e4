"""Writes the Flower app of a deployment: the agreement, the code that Flower runs, and a README."""

from pathlib import Path
from string import Template

from fedlight.config import CellConfig
from fedlight.deployment.agreement import FILE, hash_agreement, write_agreement
from fedlight.deployment.deployable import agreed_classes, check_deployable
from fedlight.experiment.mechanisms import listed_nodes
from fedlight.experiment.server_view import describe_server_view, describe_signing
from fedlight.experiment.targets import check_targets
from fedlight.runtime.errors import BadInput

PACKAGE = "federation"  # in the folder of the app
TEMPLATES = Path(__file__).parent / "templates"


def write_app(folder: Path, config: CellConfig) -> str:
    """Writes the app of a cell.

    Args:
        folder: to write; must not exist.
        config: of the cell.

    Returns:
        SHA-256 of the agreement.

    Raises:
        BadInput: the folder exists, or the cell cannot be deployed.
    """
    if folder.exists():
        raise BadInput(f"{folder} is there already: choose another folder, or remove it")
    check_deployable(config)
    check_targets(config.plain())
    classes = agreed_classes(config)
    inner = folder / PACKAGE
    inner.mkdir(parents=True)
    write_agreement(agreement_of(folder), config.plain())
    sha256 = hash_agreement(agreement_of(folder))
    words = {
        "name": config.name,
        "clients": config.clients,
        "last": config.clients - 1,
        "rounds": config.rounds,
        "method": config.method.name,
        "sha256": sha256,
        "sees": describe_server_view(config) or "each update by itself",
        "signing": f"; {signing}" if (signing := describe_signing(config)) else "",
        "key": ' key="/path/to/node.key"' if config.aggregation and listed_nodes(config) else "",
        "check_key": " --key node.key" if listed_nodes(config) else "",
        "classes": f", which are {', '.join(classes)}" if classes else "",
    }
    _write(inner / "__init__.py", f'"""The federation {config.name}."""\n')
    for name in ("server_app.py", "client_app.py"):
        _write(inner / name, _template(name))
    for name in ("pyproject.toml", "README.md"):
        _write(folder / name, Template(_template(name)).substitute(words))
    return sha256


def agreement_of(folder: Path) -> Path:
    """The path of the agreement in the folder of an app."""
    return folder / PACKAGE / FILE


def _template(name: str) -> str:
    return (TEMPLATES / f"{name}.txt").read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
