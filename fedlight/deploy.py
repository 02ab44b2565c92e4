"""A federation between institutions: fedlight deploy init FOLDER [KEY=VALUE ...], deploy check FOLDER ..."""

import argparse
import sys
from pathlib import Path
from string import Template

from hydra import compose, initialize_config_dir

from fedlight.overrides import keep_text
from fedlight.run import ROOT, USER_ERRORS, print_error, register_resolvers
from fedlight.runtime.environment import load_environment, replace_unencodable
from fedlight.runtime.errors import BadInput

PACKAGE = "federation"  # in the folder of the app
TEMPLATES = Path(__file__).parent / "templates"


def main() -> None:
    """Exits with 0, or with 2 for bad input."""
    replace_unencodable()
    parser = argparse.ArgumentParser(
        prog="fedlight deploy", description="A federation between institutions, by Flower."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    init = verbs.add_parser(
        "init", help="writes a Flower app that is ready, with a README for the consortium"
    )
    init.add_argument("folder", type=Path, help="of the app; it must not be there yet")
    init.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the cell, as for fedlight run")
    check = verbs.add_parser("check", help="what an institution finds, and what would leave it")
    check.add_argument("folder", type=Path, help="of the app")
    check.add_argument(
        "--agreed", required=True, metavar="SHA256", help="of the configuration that was agreed"
    )
    check.add_argument("--client", type=int, required=True, help="the institution's number, from 0")
    check.add_argument("--data-root", type=Path, help="the folder of its images")
    asked = parser.parse_args()
    load_environment()
    try:
        if asked.verb == "init":
            write_app(asked.folder, asked.overrides)
        else:
            check_institution(asked.folder, asked.agreed, asked.client, asked.data_root)
    except USER_ERRORS as error:
        sys.exit(print_error(error))


def write_app(folder: Path, overrides: list[str]) -> None:
    """Writes the app of a cell.

    Raises:
        BadInput: the folder is there already, or the cell cannot be deployed.
    """
    from fedlight.config import validate
    from fedlight.deployment.agreement import FILE, agreed_hash, write_agreement
    from fedlight.deployment.deployed import agreed_classes, check_deployable
    from fedlight.experiment.targets import check_targets

    if folder.exists():
        raise BadInput(f"{folder} is there already: choose another folder, or remove it")
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = validate(compose("config", overrides=["transport=flower", *keep_text(overrides)]))
    if config.privacy and not any(o.lstrip("+").startswith("privacy.secure_noise=") for o in overrides):
        privacy = config.privacy.model_copy(update={"secure_noise": True})
        config = config.model_copy(update={"privacy": privacy})
    check_deployable(config)
    check_targets(config.plain())
    classes = agreed_classes(config)
    inner = folder / PACKAGE
    inner.mkdir(parents=True)
    write_agreement(inner / FILE, config.plain())
    words = {
        "name": config.name,
        "clients": config.clients,
        "last": config.clients - 1,
        "rounds": config.rounds,
        "method": config.method.name,
        "sha256": agreed_hash(inner / FILE),
        "classes": f", which are {', '.join(classes)}" if classes else "",
    }
    (inner / "__init__.py").write_text(f'"""The federation {config.name}."""\n', encoding="utf-8")
    for template in ("server_app.py", "client_app.py"):
        (inner / template).write_text(
            (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8"), encoding="utf-8"
        )
    for template in ("pyproject.toml", "README.md"):
        (folder / template).write_text(
            Template((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")).substitute(words),
            encoding="utf-8",
        )
    readme = folder / "README.md"
    print(f"{folder}: a federation of {config.clients} institutions; {readme} says what each types")
    print(f"sha256 {words['sha256']}")


def check_institution(folder: Path, agreed_to: str, client: int, root: Path | None) -> None:
    """Prints what an institution finds and what would leave it; trains nothing.

    Raises:
        BadInput: the configuration is not the one that was agreed, or cannot be followed here.
    """
    import numpy as np

    from fedlight.deployment.agreement import FILE, check_agreed
    from fedlight.deployment.deployed import MODELS, agreed, agreed_classes, set_up_institution

    path = folder / PACKAGE / FILE
    check_agreed(path, agreed_to)
    config = agreed(path, None if root is None else str(root.absolute()))
    parts = set_up_institution(config, client)
    images = len(parts.client_indices[client])
    if not images:
        raise BadInput(f"client {client} would train on no image")
    slices, method = parts.slices.names, parts.method
    state = parts.model.state_dict()
    place = root or f"the share of client {client} in {config.data.name}, dealt as in a simulation"
    print(f"configuration  {agreed_to}, as agreed")
    print(f"data           {images} images of {config.data.shape} to train on, from {place}")
    labels = parts.dataset.train.labels[parts.client_indices[client]]
    counts = np.bincount(labels, minlength=len(parts.dataset.classes))
    named = (f"{name} {count}" for name, count in zip(parts.dataset.classes, counts, strict=True))
    numbered = "as agreed" if agreed_classes(config) else "of this institution; none were agreed"
    print(f"classes        {', '.join(named)} ({numbered})")
    print(f"leaves, in each of up to {config.rounds} rounds:")
    for slice_ in method.uplink:
        sent = [state[name] for name in slices[slice_]]
        size = sum(tensor.nbytes for tensor in sent)
        encoded = ", encoded" if config.transform and config.transform.up else ""
        params = sum(tensor.numel() for tensor in sent)
        print(f"  {slice_:12} {params:,} trained parameters, {size:,} bytes{encoded}")
    if aux := parts.algorithm.aux_like({n: state[n] for s in method.uplink for n in slices[s]}):
        numbers = sum(tensor.numel() for tensor in aux.values())
        print(f"  {'algorithm':12} {numbers:,} numbers that it corrects the others with")
    if not config.privacy:
        print("  the number of images, the mean training loss")
    if method.evaluate == "clients":
        due = f"and every {config.evaluation.every} rounds" if config.evaluation.every else "once"
        drawn = config.evaluation.grid or config.evaluation.samples
        scores = "images drawn from its own model and their scores, " if drawn else ""
        print(
            f"leaves at the end, {due}: {scores}the fingerprint of its own model, each with up to {MODELS} "
            "versions of the global slices"
        )
    staying = [slice_ for slice_ in slices if slice_ not in method.uplink]
    if method.warm_start:
        print(f"leaves in the first {method.warm_start} rounds alone: {', '.join(staying) or 'nothing'}")
        staying = []
    print(f"never leaves: the images{''.join(f', {slice_}' for slice_ in staying)}")


if __name__ == "__main__":
    main()
