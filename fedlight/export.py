"""A trained model for diffusers: python -m fedlight.export runs/NAME/CELL --out FOLDER [--push OWNER/NAME]"""

import sys
from pathlib import Path

from fedlight.command import cell_parser, run_command
from fedlight.config import CellConfig
from fedlight.experiment.hub import check_repo, upload
from fedlight.runtime.environment import load_environment
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, or with 2 for bad input."""
    parser = cell_parser(
        "export",
        "Writes a model of a finished cell for diffusers, with the code of its UNet beside the weights, so "
        "that it loads where fedlight is not installed.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the folder to write; must be new or empty; with --push, without it, NAME in the current folder",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder with a model card to this repository of the Hugging Face Hub; a new one is "
        "private",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a model with adapters (finetuning=lora) write these alone, as diffusers' load_lora_weights "
        "reads them; without it they are merged into the pretrained weights",
    )
    load_environment()
    sys.exit(run_command(parser, export))


def export(
    cell: Path, client: int | None, out: Path | None, push: str | None, adapter: bool, trust: bool
) -> int:
    """Writes a model of a finished cell as a pipeline of diffusers.

    Args:
        cell: its folder.
        client: whose own model, or None for the federated one.
        out: the folder to write; new or empty; None for the name of the repository.
        push: the repository of the Hugging Face Hub, OWNER/NAME, or None.
        adapter: whether to write the adapters of the model alone.
        trust: whether the cell's configuration may run whatever code it names.

    Returns:
        1 where the folder was written and could not be uploaded, else 0.

    Raises:
        BadInput: no finished cell, no such model, no valid repository, or `out` is not empty; or there are no
            adapters to write, or they would be uploaded without their model.
    """
    if push is not None and adapter:
        raise BadInput(
            "--push uploads a whole pipeline: leave out --adapter, or upload the folder by hf upload"
        )
    if push is not None:
        check_repo(push)
        out = out or Path(push.rpartition("/")[2])
    if out is None:
        raise BadInput("--out FOLDER is missing, the folder to write")
    from fedlight.experiment.finished import open_cell

    opened = open_cell(cell, trust)
    pipeline = None if adapter else opened.model(client)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out: {out} is there already, and not empty; choose another folder, or empty it")
    if pipeline is None:
        opened.save_adapter(out, client)
        print(f'pipeline.load_lora_weights("{out}")    # of a diffusers pipeline of the pretrained model')
        return 0
    from fedlight.experiment.pipeline import add_code, save_pipeline

    save_pipeline(out, pipeline)
    load = add_code(out)
    print(load)
    return 0 if push is None else _push(cell, opened.config, client, out, push, load)


def _push(cell: Path, config: CellConfig, client: int | None, out: Path, repo: str, load: str) -> int:
    """Adds the model card and uploads the folder; returns the exit status."""
    from fedlight.experiment.model_card import write_card

    write_card(out, cell, config, client, repo, load)
    if reason := upload(out, repo):
        print(
            f"fedlight: {out} is written and not uploaded ({reason}); where there is internet, type: "
            f"hf auth login; hf upload {repo} {out}",
            file=sys.stderr,
        )
        return 1
    print(f"uploaded to https://huggingface.co/{repo}; the licence is not set: fill it in, in README.md")
    return 0


if __name__ == "__main__":
    main()
