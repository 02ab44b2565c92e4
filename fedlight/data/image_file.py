"""One image file: its values as they are stored, and as bytes, cut to a square and resized."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
MODES = {1: "L", 3: "RGB"}
BACKGROUND = 255  # of transparent images: white
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, UNSIGNED = 0, 1  # values of the last two


class Depth(NamedTuple):
    """What the values of a file may be.

    Attributes:
        name: for people, such as "16-bit".
        largest: value that the file type holds, or None where that says nothing about what is white.
        upper: whether only the upper eight bits of 16 can be read.
    """

    name: str
    largest: int | None
    upper: bool = False


BYTES = Depth("8-bit", 255)


class StoredImage(NamedTuple):
    """An image as it is stored, turned as its camera says.

    Attributes:
        values: shape (height, width), or (height, width, 3) for colour of 8 bits.
        alpha: uint8 in 0..255, shape (height, width); None where all is opaque.
        depth: of the values.
        negative: whether 0 is white.
        frames: of the file, of which this is the first.
    """

    values: NDArray[Any]
    alpha: NDArray[np.uint8] | None
    depth: Depth
    negative: bool
    frames: int

    def used(self) -> tuple[float, float] | None:
        """The smallest and the largest value that can be seen; None where all is transparent."""
        seen = self.values if self.alpha is None else self.values[self.alpha > 0]
        if not seen.size:
            return None
        lowest, highest = seen.min().item(), seen.max().item()
        return (256 * lowest, 256 * highest + 255) if self.depth.upper else (lowest, highest)

    def to_bytes(self, bounds: tuple[float, float] | None) -> NDArray[np.uint8]:
        """The values as bytes, on a white background where the image is transparent.

        Args:
            bounds: the values that become 0 and 255, those between in proportion and rounded, others cut
                off; None for the upper eight bits of what the file type holds, where it says that.
        """
        if bounds:
            low, high = bounds
            shares = (self.values.astype(np.float64) - low) / (high - low)
            scaled = np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)
        elif self.values.dtype == np.uint8:
            scaled = self.values
        else:
            assert self.depth.largest is not None
            scaled = (self.values // ((self.depth.largest + 1) // 256)).astype(np.uint8)
        if self.negative:
            scaled = 255 - scaled
        if self.alpha is None:
            return scaled
        alpha = self.alpha.astype(np.uint32).reshape(*self.alpha.shape, *[1] * (scaled.ndim - 2))
        return ((scaled * alpha + BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8)


def read_image(path: Path, channels: int) -> StoredImage:
    """Reads the first image of a file.

    Args:
        path: of the file; its content decides what it is, not its name.
        channels: 1 or 3: what an image of 8 bits becomes, grey or RGB; one of more bits stays grey.

    Raises:
        Exception: the file is broken or no image; Pillow's readers raise almost anything.
        ValueError: it holds values that are not finite.
    """
    # an open file: of a path, Pillow would map TIFF into memory, and scramble it where a camera was turned
    with path.open("rb") as file, Image.open(file, formats=tuple(FORMATS)) as image:
        tags = getattr(image, "tag_v2", {})
        depth = _depth(image, tags)
        negative = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and image.mode.startswith(("I", "F"))
        unsigned = tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED
        frames = _frames(image)
        upright = ImageOps.exif_transpose(image)
    if not upright.mode.startswith(("I", "F")):
        values, alpha = _bytes(upright, channels)
        return StoredImage(values, _or_opaque(alpha), depth, negative, frames)
    values = np.asarray(upright)
    if upright.mode == "I" and depth.name == "32-bit" and unsigned:
        values = values.view(np.uint32)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    hidden = upright.info.get("transparency")
    alpha = None if hidden is None else np.where(values == hidden, 0, 255).astype(np.uint8)
    return StoredImage(values, _or_opaque(alpha), depth, negative, frames)


def fit(pixels: NDArray[np.uint8], channels: int, image_size: int) -> NDArray[np.uint8]:
    """The central square of an image, resized with antialiasing.

    Args:
        pixels: shape (height, width) or (height, width, 3).
        channels: of the result, 1 for grey, 3 for RGB.
        image_size: of the result, in pixels.

    Returns:
        Shape (channels, image_size, image_size).
    """
    image = Image.fromarray(pixels).convert(MODES[channels])
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    resized = square.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def reason(error: Exception) -> str:
    """Why a file cannot be read, without its path, which may change."""
    if isinstance(error, UnidentifiedImageError):
        return f"no image of {', '.join(FORMATS)}"
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _depth(image: Image.Image, tags: Any) -> Depth:
    """What the values of an opened file may be; to be called before it is loaded."""
    if image.mode.startswith("I;16"):
        bits = int(tags.get(BITS_PER_SAMPLE, (16,))[0])
        return Depth(f"{bits}-bit", 2**bits - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return Depth("16-bit", 2**16 - 1)
    if image.mode == "I":
        signed = int(tags.get(BITS_PER_SAMPLE, (32,))[0]) == 16
        return Depth("signed 16-bit" if signed else "32-bit", None)
    if image.mode == "F":
        return Depth("floating point", None)
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        scaled = image.format == "PPM" and len(arguments) == 2 and arguments[1] > 255
        if scaled or ";16" in str(arguments[0]):
            return Depth("16-bit colour", 2**16 - 1, upper=True)
    return BYTES


def _frames(image: Image.Image) -> int:
    """How many images a file holds; a preview inside a JPEG is none."""
    try:
        return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    except Exception:  # what follows the first image is broken
        return 1


def _bytes(image: Image.Image, channels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """An image of 8 bits as grey or RGB, and its alpha."""
    if image.mode == "La":
        image = image.convert("LA")
    alpha = None
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        image.info.pop("transparency", None)
    return np.asarray(image.convert(MODES[channels])), alpha


def _or_opaque(alpha: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    return None if alpha is None or alpha.min(initial=255) == 255 else alpha


def number(value: float) -> str:
    """A value of a file for people: whole numbers as such."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.6g}"
