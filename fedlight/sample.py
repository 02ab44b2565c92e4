"""Images from a finished cell: python -m fedlight.sample runs/NAME/CELL [--client K] [--label L] ..."""

import sys
from pathlib import Path
from typing import Any

from fedlight.command import cell_parser, run_command
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, with 1 for images that are not finite, or with 2 for bad input."""
    parser = cell_parser("sample", "Draws images from the model of a finished cell.")
    parser.add_argument(
        "--label", type=int, help="of all images; without it, a conditional model draws each label in turn"
    )
    parser.add_argument("--images", type=int, default=64, help="number of images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images (default: %(default)s)")
    parser.add_argument("--scale", type=int, help="side of the square that each pixel becomes, in pixels")
    parser.add_argument("--animate", action="store_true", help="write the denoising steps as a GIF")
    parser.add_argument(
        "--out",
        type=Path,
        help="a PNG for one grid (default: grid.png), a folder for one PNG per image, or a GIF (grid.gif)",
    )
    sys.exit(run_command(parser, draw_images))


def draw_images(
    cell: Path,
    client: int | None,
    label: int | None,
    images: int,
    seed: int,
    scale: int | None,
    animate: bool,
    out: Path | None,
    trust: bool,
) -> None:
    """Draws images from a finished cell's model, with the sampler of its configuration.

    Args:
        cell: its folder.
        client: whose own model to draw from, or None for the federated one.
        label: of all images of a conditional model, or None for each label in turn.
        images: number of images, 1 or more.
        seed: of the images.
        scale: the side of the square that each pixel becomes, 1 or more; None for 1, and a titled grid.
        animate: whether to write the denoising steps as a GIF.
        out: a path that ends in .png for one grid, or in .gif for an animation, else a folder for one PNG
            per image.
        trust: whether the cell's configuration may run whatever code it names.

    Raises:
        BadInput: no finished cell, no such client or label, a client-level cell without a client, or a
            cell that is not trusted and names other code than fedlight's.
    """
    if images < 1:
        raise BadInput(f"--images must be 1 or more, got {images}")
    if scale is not None and scale < 1:
        raise BadInput(f"--scale must be 1 or more, got {scale}")
    out = out or Path("grid.gif" if animate else "grid.png")
    if animate != (out.suffix.lower() == ".gif"):
        raise BadInput(f"--animate needs an --out that ends in .gif, and such an --out needs it; got {out}")
    from fedlight.diffusion.sampling import BATCH
    from fedlight.experiment.finished import open_cell
    from fedlight.loggers import pictures

    if animate and images > BATCH:
        raise BadInput(f"--animate takes at most {BATCH} images, got {images}")
    frames: list[Any] = []  # uint8 tensors, one per denoising step
    opened = open_cell(cell, trust)
    drawn = opened.sample(client, images, label, seed, frames.append if animate else None)
    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    if animate:
        pictures.animation(out, frames, scale or 1)
    elif out.suffix.lower() == ".png" and scale:
        pictures.pixel_grid(out, drawn, scale)
    elif out.suffix.lower() == ".png":
        whose = "federated model" if client is None else f"client {client}"
        pictures.sample_grid(out, [("", drawn)], f"{opened.folder.name}, {whose}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(drawn):
            pictures.single_image(out / f"{number:05d}.png", image, scale or 1)
    print(f"{images} images in {out}{'/' if out.is_dir() and out.name else ''}")


if __name__ == "__main__":
    main()
