"""Images from a finished cell: python -m fedlight.sample runs/NAME/CELL [--client K] [--label L] ..."""

import argparse
import sys
from pathlib import Path

from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, or with 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fedlight.sample", description="Images from a finished cell."
    )
    parser.add_argument("cell", type=Path, help="the cell's folder, runs/NAME/CELL")
    parser.add_argument("--client", type=int, help="the client's own model; without it, the federated one")
    parser.add_argument(
        "--label", type=int, help="of all images; without it, a conditional model draws each in turn"
    )
    parser.add_argument("--images", type=int, default=64, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides the images (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("grid.png"), help="a PNG for a grid, or a folder for a PNG an image"
    )
    parser.add_argument(
        "--trust", action="store_true", help="run whatever code the cell's configuration names"
    )
    asked = parser.parse_args()
    try:
        draw_images(asked.cell, asked.client, asked.label, asked.images, asked.seed, asked.out, asked.trust)
    except (BadInput, OSError) as error:
        print(f"fedlight: error: {error}", file=sys.stderr)
        sys.exit(2)


def draw_images(
    folder: Path, client: int | None, label: int | None, images: int, seed: int, out: Path, trust: bool
) -> None:
    """Draws images from a finished cell's model, with the sampler of its configuration.

    Args:
        folder: of the cell.
        client: whose own model to draw from, or None for the federated one.
        label: of all images of a conditional model, or None for each in turn.
        images: how many, 1 or more.
        seed: decides the images.
        out: a path that ends in .png for one picture of all, else a folder for a PNG each.
        trust: whether the cell's configuration may run whatever code it names.

    Raises:
        BadInput: no finished cell, no such client or label, a client-level cell without a client, or a
            cell that is not trusted and names other code than fedlight's.
    """
    if images < 1:
        raise BadInput(f"--images must be 1 or more, got {images}")
    from fedlight.experiment.finished import open_cell
    from fedlight.loggers import pictures

    cell = open_cell(folder, trust)
    drawn = cell.draw(client, images, seed, label)
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        whose = "federated model" if client is None else f"client {client}"
        pictures.sample_grid(out, [("", drawn)], f"{cell.folder.name}, {whose}")
        print(f"{images} images in {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(drawn):
        pictures.single_image(out / f"{number:05d}.png", image)
    print(f"{images} images in {out}{'' if out.name == '' else '/'}")


if __name__ == "__main__":
    main()
