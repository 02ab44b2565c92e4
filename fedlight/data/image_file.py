"""Reads one image file: its stored values, and the same as bytes, cropped to a square and resized."""

import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
BACKGROUND = 255  # white, behind transparent images
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
WHITE_IS_ZERO, UNSIGNED = 0, 1  # values of PHOTOMETRIC and of SAMPLE_FORMAT


class Depth(NamedTuple):
    """The number type of a file's values.

    Attributes:
        name: for messages, such as "16-bit".
        largest: the largest value of the type; None for types that do not define white.
        upper_bits_only: whether only the upper eight of 16 bits can be read.
    """

    name: str
    largest: int | None
    upper_bits_only: bool = False


BYTES = Depth("8-bit", 255)


class StoredImage(NamedTuple):
    """The stored values of an image, rotated by its EXIF orientation.

    Attributes:
        values: shape (height, width), or (height, width, 3) for colour of 8 bits.
        alpha: uint8 in 0..255, shape (height, width); None for an opaque image.
        depth: of the values.
        negative: whether 0 is white.
        frames: number of images in the file; this is the first.
    """

    values: NDArray[Any]
    alpha: NDArray[np.uint8] | None
    depth: Depth
    negative: bool
    frames: int

    def used_values(self) -> tuple[float, float] | None:
        """The smallest and the largest visible value; None where all is transparent."""
        visible = self.values if self.alpha is None else self.values[self.alpha > 0]
        if not visible.size:
            return None
        lowest, highest = visible.min().item(), visible.max().item()
        return (256 * lowest, 256 * highest + 255) if self.depth.upper_bits_only else (lowest, highest)

    def to_bytes(self, bounds: tuple[float, float] | None) -> NDArray[np.uint8]:
        """The values as bytes, on a white background where the image is transparent.

        Args:
            bounds: the values that become 0 and 255; values between are scaled linearly and rounded, values
                outside are clipped. None for the upper eight bits of the file type, whose depth must have a
                `largest`.
        """
        if bounds:
            low, high = bounds
            fractions = (self.values.astype(np.float64) - low) / (high - low)
            scaled = np.rint(np.clip(fractions, 0, 1) * 255).astype(np.uint8)
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


def read_image(source: Path | BinaryIO, channels: int) -> StoredImage:
    """Reads the first image of a file.

    Args:
        source: path or content of the file; the content decides the format, not the name.
        channels: 1 or 3; an image of 8 bits is converted to grey or RGB, one of more bits stays grey.

    Raises:
        Exception: the file is broken or no image; Pillow's readers raise almost anything.
        ValueError: a value is not finite.
    """
    # an open file: given a path, Pillow maps TIFF into memory, and scrambles images with an EXIF orientation
    opened = source.open("rb") if isinstance(source, Path) else source
    with opened as file, Image.open(file, formats=tuple(FORMATS)) as image:
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
    transparent = upright.info.get("transparency")
    alpha = None if transparent is None else np.where(values == transparent, 0, 255).astype(np.uint8)
    return StoredImage(values, _or_opaque(alpha), depth, negative, frames)


def crop_and_resize(pixels: NDArray[np.uint8], channels: int, image_size: int) -> NDArray[np.uint8]:
    """Crops the central square of an image and resizes it with antialiasing.

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


def explain_unreadable(error: Exception) -> str:
    """The reason why a file cannot be read, in one line and without the file's path."""
    if isinstance(error, UnidentifiedImageError):
        return f"no image of {', '.join(FORMATS)}"
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _depth(image: Image.Image, tags: Any) -> Depth:
    """The depth of an opened image; must be called before the image is loaded."""
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
            return Depth("16-bit colour", 2**16 - 1, upper_bits_only=True)
    return BYTES


def _frames(image: Image.Image) -> int:
    """The number of images in a file; a preview inside a JPEG does not count."""
    try:
        return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    except Exception:  # the images after the first are broken
        return 1


def _bytes(image: Image.Image, channels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """The values of an 8-bit image as grey or RGB, and its alpha."""
    if image.mode == "La":
        image = image.convert("LA")
    alpha = None
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        image.info.pop("transparency", None)
    return np.asarray(image.convert(MODES[channels])), alpha


def _or_opaque(alpha: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    return None if alpha is None or alpha.min(initial=255) == 255 else alpha


def format_number(value: float) -> str:
    """Formats a value for a message; a whole number has no decimal point."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.6g}"
