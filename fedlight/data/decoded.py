"""Image files, decoded once into a memory-mapped array of bytes in the cache folder."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic, explain_cache, remove_unfinished
from fedlight.runtime.progress import track

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


def decode(
    name: str,
    files: Sequence[Path],
    cache: str,
    image_size: int,
    channels: int,
    skip_unreadable: bool = False,
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Decodes each file, cuts out the central square and resizes it, antialiased.

    The result is kept in `cache` for as long as no file changes in path, size or time of modification. Of
    processes started at once, one decodes and the others wait for it.

    Args:
        name: of the data set, the first part of the name of the cached file.
        files: the images.
        cache: the folder of the cache.
        image_size: of the result, in pixels.
        channels: 1 for grey, 3 for RGB.
        skip_unreadable: whether files that are no images are none; else they are an error.

    Returns:
        uint8, shape (len(files), channels, image_size, image_size), mapped copy-on-write: a page is read
        when it is touched, and what is written to it stays in memory; and which of the files were read.

    Raises:
        BadInput: files are missing or no images of 8 or 16 bits a channel, `channels` is neither 1 nor 3, or
            the cache cannot be written.
    """
    if channels not in MODES:
        raise BadInput(f"data.channels must be 1 (grey) or 3 (RGB), got {channels}")
    shape = (len(files), channels, image_size, image_size)
    path = Path(cache) / "decoded" / f"{name}-{_fingerprint(files, shape)}.npy"
    try:
        if not _is_whole(path, shape):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not _is_whole(path, shape):
                    remove_unfinished(path)
                    _write(path, files, shape, skip_unreadable)
        pixels = torch.from_numpy(np.load(path, mmap_mode="c"))
        broken = json.loads(_broken(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"data.cache: {math.prod(shape):,} bytes of decoded images cannot be kept: "
            f"{explain_cache(error, 'data.cache or FEDLIGHT_CACHE')}"
        ) from error
    if not skip_unreadable:
        _refuse(broken, files)
    return pixels, np.array([str(file) not in broken for file in files])


def _fingerprint(files: Sequence[Path], shape: tuple[int, ...]) -> str:
    """Hash of everything that decides the decoded bytes."""
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=8)
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise BadInput(f"data.root: {path} cannot be read ({error.strerror})") from error
        digest.update(repr((os.path.abspath(path), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        pixels = np.load(path, mmap_mode="r")
    except PermissionError:
        raise
    except (OSError, EOFError, ValueError):
        return False
    return pixels.shape == shape and pixels.dtype == np.uint8 and _broken(path).is_file()


def _write(path: Path, files: Sequence[Path], shape: tuple[int, ...], skip_unreadable: bool) -> None:
    read = partial(_try_read, channels=shape[1], image_size=shape[2])
    broken: dict[str, str] = {}
    with atomic(path) as temporary, temporary.open("wb") as file, ThreadPool() as pool:
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        images = track(pool.imap(read, files, chunksize=16), "decoding images", len(files))
        for source, image in zip(files, images, strict=True):
            if isinstance(image, str):
                broken[str(source)] = image
                image = np.zeros(shape[1:], np.uint8)
            file.write(image.tobytes())
        if not skip_unreadable:
            _refuse(broken, files)
        with atomic(_broken(path)) as noted:
            noted.write_text(json.dumps(broken), encoding="utf-8")


def _refuse(broken: Mapping[str, str], files: Sequence[Path]) -> None:
    if broken:
        raise BadInput(
            f"data.root: {len(broken)} of {len(files)} files cannot be read as images: "
            f"{'; '.join(f'{file} ({why})' for file, why in broken.items())}: repair or remove them; "
            "data=image_folder leaves them out with data.skip_unreadable=true"
        )


def _broken(path: Path) -> Path:
    """Beside decoded images: the files among them that could not be read, and why."""
    return path.with_suffix(".json")


def _try_read(path: Path, channels: int, image_size: int) -> NDArray[np.uint8] | str:
    """One image, shape (channels, image_size, image_size), or why it cannot be read."""
    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            upright = ImageOps.exif_transpose(_eight_bits(image)).convert(MODES[channels])
    except Exception as error:  # a broken file makes Pillow's readers raise almost anything
        return str(error) or type(error).__name__
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    square = upright.crop((left, top, left + side, top + side))
    resized = square.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits a pixel by its upper eight; another as it is."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise ValueError("it has more than 16 bits a channel: save it with 8 or 16")
    reduced = Image.fromarray((values // 256).astype(np.uint8))
    reduced.info = image.info
    return reduced
