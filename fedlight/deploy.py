"""A federation between institutions: fedlight deploy init FOLDER [KEY=VALUE ...], deploy check FOLDER ..."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fedlight.command import describe_error, run_command
from fedlight.runtime.environment import load_environment
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, or with 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="fedlight deploy", description="A federation between institutions, by Flower."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    init = verbs.add_parser(
        "init", help="writes a Flower app that is ready to run, with a README for the consortium"
    )
    init.add_argument("folder", type=Path, help="output folder; must not exist")
    init.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the cell, as for fedlight run")
    check = verbs.add_parser("check", help="shows an institution its data, and what would leave it")
    check.add_argument("folder", type=Path, help="folder of the app")
    check.add_argument(
        "--agreed", required=True, metavar="SHA256", help="of the configuration that was agreed"
    )
    check.add_argument("--client", type=int, required=True, help="the institution's number, from 0")
    check.add_argument("--data-root", type=Path, help="folder of the institution's images")
    check.add_argument(
        "--key", type=Path, help="private key of the institution's node, where keys were agreed"
    )
    sys.exit(run_command(parser, deploy))


def deploy(verb: str, **arguments: Any) -> None:
    """Calls the function of a verb with its arguments."""
    load_environment()
    if verb == "init":
        init_app(**arguments)
    else:
        check_institution(**arguments)


def init_app(folder: Path, overrides: list[str]) -> None:
    """Writes the app of a cell.

    Args:
        folder: to write; must not exist.
        overrides: KEY=VALUE, of the cell.

    Raises:
        BadInput: the folder exists, the overrides are wrong, or the cell cannot be deployed.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from fedlight.compose import compose_config
    from fedlight.config import validate

    try:
        config = validate(compose_config(["transport=flower", *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise BadInput(describe_error(error)) from error
    from fedlight.deployment.app import write_app

    if config.privacy and not any(o.lstrip("+").startswith("privacy.secure_noise=") for o in overrides):
        privacy = config.privacy.model_copy(update={"secure_noise": True})
        config = config.model_copy(update={"privacy": privacy})
    sha256 = write_app(folder, config)
    readme = folder / "README.md"
    print(f"{folder}: a federation of {config.clients} institutions; {readme} says what each types")
    print(f"sha256 {sha256}")


def check_institution(
    folder: Path, agreed: str, client: int, data_root: Path | None, key: Path | None
) -> None:
    """Prints what an institution would train on and what would leave it; trains nothing.

    Args:
        folder: of the app.
        agreed: SHA-256 of the configuration that was agreed.
        client: the institution's number.
        data_root: folder of its images, or None for its share of a public data set.
        key: the private key of its node, to compare with the agreement; None to compare none.

    Raises:
        BadInput: the configuration is not the one that was agreed, or cannot be followed here.
    """
    from fedlight.deployment.agreement import check_agreed
    from fedlight.deployment.app import agreement_of
    from fedlight.deployment.deployable import load_agreed_config
    from fedlight.deployment.disclosure import describe_data, describe_disclosure, describe_key
    from fedlight.deployment.participants import set_up_institution

    path = agreement_of(folder)
    check_agreed(path, agreed)
    config = load_agreed_config(path, None if data_root is None else str(data_root.absolute()))
    components = set_up_institution(config, client)
    data = describe_data(config, components, client, data_root)
    print(
        f"configuration  {agreed}, as agreed",
        *describe_key(config, client, key),
        data,
        *describe_disclosure(config, components, client),
        sep="\n",
    )


if __name__ == "__main__":
    main()
