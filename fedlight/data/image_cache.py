"""The cache of decoded images: a set's files are decoded once into a memory-mapped array of bytes."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from fedlight.data.file_hashes import file_hashes
from fedlight.data.image_file import MODES, Depth, crop_and_resize, explain_unreadable, read_image
from fedlight.data.pixel_range import Bounds, Range, UsedValues
from fedlight.runtime.cache import explain_cache, remove_unfinished
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic
from fedlight.runtime.printable import legible
from fedlight.runtime.progress import track

T = TypeVar("T")
NAMED = 3  # unreadable files that a message names
VERSION = 2  # of the decoding, part of the cached file's name


class Decoded(NamedTuple):
    """The images of a set.

    Attributes:
        pixels: uint8, shape (files, channels, image_size, image_size), memory-mapped copy-on-write: a page is
            read on first access, and writes stay in memory.
        read: whether each file could be read, shape (files,).
        further_frames: number of frames beyond the first of each file, which are not used.
        notes: lines for the user about the range of the set's values.
    """

    pixels: Tensor
    read: NDArray[np.bool_]
    further_frames: int
    notes: tuple[str, ...]


class DecodedFile(NamedTuple):
    """One decoded file.

    Attributes:
        pixels: uint8, shape (channels, image_size, image_size).
        depth: of the stored values.
        used: the smallest and the largest visible value; None where all is transparent.
        frames: number of images in the file.
    """

    pixels: NDArray[np.uint8]
    depth: Depth
    used: Bounds | None
    frames: int


def decode(
    name: str,
    folder: Path,
    files: Sequence[Path],
    cache: str,
    image_size: int,
    channels: int,
    skip_unreadable: bool = False,
    range_: Range = "type",
) -> Decoded:
    """Decodes each file, crops the central square and resizes it with antialiasing.

    Transparent images get a white background. The result is cached under a hash of the files' contents. Of
    several processes started at once, one decodes and the others wait for it.

    Args:
        name: of the data set, the first part of the cached file's name.
        folder: that the files are in.
        files: the image files.
        cache: fedlight's cache folder.
        image_size: of the result, in pixels.
        channels: 1 for grey, 3 for RGB.
        skip_unreadable: whether unreadable files are left out; otherwise they are an error.
        range_: which values of the files become 0 and 255: "type", those that the file type can hold;
            "measured", the smallest and the largest of all files; or two numbers.

    Raises:
        BadInput: a file is missing or unreadable, `channels` is neither 1 nor 3, `range_` does not fit the
            files, or the cache cannot be written.
    """
    if channels not in MODES:
        raise BadInput(f"data.channels must be 1 (grey) or 3 (RGB), got {channels}")
    shape = (len(files), channels, image_size, image_size)
    setting: str | Bounds = range_ if isinstance(range_, str) else (float(range_[0]), float(range_[1]))
    digest = hashlib.blake2b(repr((VERSION, shape, setting)).encode(), digest_size=8)
    for content in file_hashes(folder, files, cache):
        digest.update(content.sha256.encode() + b"\n")
    path = Path(cache) / "decoded" / f"{name}-{digest.hexdigest()}.npy"
    try:
        if not _is_complete(path, shape):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not _is_complete(path, shape):
                    remove_unfinished(path)
                    _write(path, files, shape, skip_unreadable, setting)
        pixels = torch.from_numpy(np.load(path, mmap_mode="c"))
        facts = json.loads(_facts_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"data.cache: {math.prod(shape):,} bytes of decoded images cannot be kept: "
            f"{explain_cache(error, 'data.cache or FEDLIGHT_CACHE')}"
        ) from error
    unreadable = {int(position): reason for position, reason in facts["broken"].items()}
    if not skip_unreadable:
        _reject(unreadable, files)
    read = np.array([position not in unreadable for position in range(len(files))])
    return Decoded(pixels, read, facts["further_frames"], tuple(facts["notes"]))


def _is_complete(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        pixels = np.load(path, mmap_mode="r")
    except PermissionError:
        raise
    except (OSError, EOFError, ValueError):
        return False
    return pixels.shape == shape and pixels.dtype == np.uint8 and _facts_path(path).is_file()


def _write(
    path: Path, files: Sequence[Path], shape: tuple[int, ...], skip_unreadable: bool, setting: str | Bounds
) -> None:
    """Decodes all files into `path`, and writes the facts about them beside it."""
    with ThreadPool() as pool:
        bounds = None if isinstance(setting, str) else setting
        if setting == "measured":
            bounds = _measure_bounds(pool, files, shape[1])
        values, unreadable, further_frames = UsedValues(setting), {}, 0
        work = partial(_decode, channels=shape[1], image_size=shape[2], bounds=bounds)
        with atomic(path) as temporary, temporary.open("wb") as file:
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for position, image in enumerate(_map(pool, work, files, "decoding images")):
                if isinstance(image, str):
                    unreadable[position] = image
                    file.write(bytes(math.prod(shape[1:])))
                    continue
                file.write(image.pixels.tobytes())
                values.add(files[position], image.depth, image.used)
                further_frames += image.frames - 1
            if not skip_unreadable:
                _reject(unreadable, files)
            values.check()
            facts = {"broken": unreadable, "further_frames": further_frames, "notes": values.notes(bounds)}
            with atomic(_facts_path(path)) as temporary_facts:
                temporary_facts.write_text(json.dumps(facts), encoding="utf-8")


def _measure_bounds(pool: ThreadPool, files: Sequence[Path], channels: int) -> Bounds:
    """The smallest and the largest visible value of all readable files."""
    values = UsedValues("measured")
    for path, result in zip(
        files, _map(pool, partial(_measure, channels=channels), files, "measuring images"), strict=True
    ):
        if not isinstance(result, str):
            values.add(path, *result)
    values.check()
    return values.bounds()


def _facts_path(path: Path) -> Path:
    """The JSON file beside the decoded images: unreadable files with reasons, further frames, and notes."""
    return path.with_suffix(".json")


def _reject(unreadable: Mapping[int, str], files: Sequence[Path]) -> None:
    """Raises BadInput where there are unreadable files; it names the first few."""
    if not unreadable:
        return
    named = [f"{legible(str(files[position]))} ({why})" for position, why in list(unreadable.items())[:NAMED]]
    further = f"; and {len(unreadable) - NAMED:,} more" if len(unreadable) > NAMED else ""
    raise BadInput(
        f"data.root: {len(unreadable):,} of {len(files):,} files cannot be read as images: {'; '.join(named)}"
        f"{further}: repair or remove them; data=image_folder leaves them out with data.skip_unreadable=true"
    )


def _map(pool: ThreadPool, work: Callable[[Path], T], files: Sequence[Path], what: str) -> Iterator[T | str]:
    """The result of `work` for each file in order, or the reason why the file cannot be read."""
    return track(pool.imap(partial(_try, work), files, chunksize=16), what, len(files))


def _try(work: Callable[[Path], T], path: Path) -> T | str:
    try:
        return work(path)
    except Exception as error:  # Pillow's readers raise almost anything for a broken file
        return explain_unreadable(error)


def _measure(path: Path, channels: int) -> tuple[Depth, Bounds | None]:
    """The depth of a file, and its smallest and largest visible value."""
    stored = read_image(path, channels)
    return stored.depth, stored.used_values()


def _decode(path: Path, channels: int, image_size: int, bounds: Bounds | None) -> DecodedFile:
    stored = read_image(path, channels)
    if bounds is None and stored.depth.largest is None:  # an error, once all files are read
        pixels = np.zeros((channels, image_size, image_size), np.uint8)
    else:
        pixels = crop_and_resize(stored.to_bytes(bounds), channels, image_size)
    return DecodedFile(pixels, stored.depth, stored.used_values(), stored.frames)
