"""Image files, decoded once into a memory-mapped array of bytes in the cache folder."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from filelock import FileLock
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from fedlight.data.file_hashes import file_hashes
from fedlight.data.image_file import MODES, Depth, fit, number, read_image, reason
from fedlight.runtime.cache import explain_cache, remove_unfinished
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic
from fedlight.runtime.printable import legible
from fedlight.runtime.progress import track

Range: TypeAlias = Literal["type", "measured"] | Sequence[float]
Bounds: TypeAlias = tuple[float, float]
T = TypeVar("T")
NAMED = 3  # broken files that a message names
VERSION = 2  # of what is cached: other numbers are decoded anew


class Decoded(NamedTuple):
    """The images of a set.

    Attributes:
        pixels: uint8, shape (files, channels, image_size, image_size), mapped copy-on-write: a page is read
            when it is touched, and what is written to it stays in memory.
        read: which of the files could be read, shape (files,).
        further_frames: of files that hold several; the first of each file is used.
        notes: what the user is to know of the set's values, a line each.
    """

    pixels: Tensor
    read: NDArray[np.bool_]
    further_frames: int
    notes: tuple[str, ...]


class DecodedFile(NamedTuple):
    """One file: its pixels, what its values may be, the smallest and largest that are seen, its frames."""

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
    """Decodes each file, cuts out the central square and resizes it, antialiased.

    Transparent images are laid on white. The result is kept in `cache` under a hash of the files' contents.
    Of processes started at once, one decodes and the others wait for it.

    Args:
        name: of the data set, the first part of the name of the cached file.
        folder: that the files are in.
        files: the images.
        cache: the folder of the cache.
        image_size: of the result, in pixels.
        channels: 1 for grey, 3 for RGB.
        skip_unreadable: whether files that are no images are left out; else they are an error.
        range_: which values of the files become 0 and 255: "type", those that the file type can hold;
            "measured", the smallest and the largest of all files; or two numbers.

    Raises:
        BadInput: files are missing or no images, `channels` is neither 1 nor 3, `range_` does not fit the
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
        if not _is_whole(path, shape):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not _is_whole(path, shape):
                    remove_unfinished(path)
                    _write(path, files, shape, skip_unreadable, setting)
        pixels = torch.from_numpy(np.load(path, mmap_mode="c"))
        facts = json.loads(_facts(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"data.cache: {math.prod(shape):,} bytes of decoded images cannot be kept: "
            f"{explain_cache(error, 'data.cache or FEDLIGHT_CACHE')}"
        ) from error
    broken = {int(position): why for position, why in facts["broken"].items()}
    if not skip_unreadable:
        _refuse(broken, files)
    read = np.array([position not in broken for position in range(len(files))])
    return Decoded(pixels, read, facts["further_frames"], tuple(facts["notes"]))


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        pixels = np.load(path, mmap_mode="r")
    except PermissionError:
        raise
    except (OSError, EOFError, ValueError):
        return False
    return pixels.shape == shape and pixels.dtype == np.uint8 and _facts(path).is_file()


def _write(
    path: Path, files: Sequence[Path], shape: tuple[int, ...], skip_unreadable: bool, setting: str | Bounds
) -> None:
    with ThreadPool() as pool:
        bounds = None if isinstance(setting, str) else setting
        if setting == "measured":
            values = Values()
            measure = partial(_try, partial(_measure, channels=shape[1]))
            for position, found in _each(pool.imap(measure, files, chunksize=16), files, "measuring images"):
                if not isinstance(found, str):
                    values.add(files[position], *found)
            values.check(setting)
            bounds = values.bounds()
        values, broken, further = Values(), {}, 0
        work = partial(_decode, channels=shape[1], image_size=shape[2], bounds=bounds)
        with atomic(path) as temporary, temporary.open("wb") as file:
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            images = pool.imap(partial(_try, work), files, chunksize=16)
            for position, image in _each(images, files, "decoding images"):
                if isinstance(image, str):
                    broken[position] = image
                    file.write(bytes(math.prod(shape[1:])))
                    continue
                file.write(image.pixels.tobytes())
                values.add(files[position], image.depth, image.used)
                further += image.frames - 1
            if not skip_unreadable:
                _refuse(broken, files)
            values.check(setting)
            facts = {"broken": broken, "further_frames": further, "notes": values.notes(setting, bounds)}
            with atomic(_facts(path)) as noted:
                noted.write_text(json.dumps(facts), encoding="utf-8")


def _facts(path: Path) -> Path:
    """Beside decoded images: the files that could not be read and why, further frames, and notes."""
    return path.with_suffix(".json")


def _refuse(broken: Mapping[int, str], files: Sequence[Path]) -> None:
    """Raises BadInput where files are broken; it names the first few."""
    if not broken:
        return
    named = [f"{legible(str(files[position]))} ({why})" for position, why in list(broken.items())[:NAMED]]
    more = f"; and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
    raise BadInput(
        f"data.root: {len(broken):,} of {len(files):,} files cannot be read as images: {'; '.join(named)}"
        f"{more}: repair or remove them; data=image_folder leaves them out with data.skip_unreadable=true"
    )


def _each(results: Iterable[T], files: Sequence[Path], what: str) -> Iterator[tuple[int, T]]:
    return enumerate(track(results, what, len(files)))


def _try(work: Callable[[Path], T], path: Path) -> T | str:
    """What `work` makes of a file, or why it cannot be read."""
    try:
        return work(path)
    except Exception as error:  # a broken file makes Pillow's readers raise almost anything
        return reason(error)


def _measure(path: Path, channels: int) -> tuple[Depth, Bounds | None]:
    """What the values of a file may be, and the smallest and largest that are seen."""
    stored = read_image(path, channels)
    return stored.depth, stored.used()


def _decode(path: Path, channels: int, image_size: int, bounds: Bounds | None) -> DecodedFile:
    stored = read_image(path, channels)
    if bounds is None and stored.depth.largest is None:  # refused once all files are measured
        pixels = np.zeros((channels, image_size, image_size), np.uint8)
    else:
        pixels = fit(stored.to_bytes(bounds), channels, image_size)
    return DecodedFile(pixels, stored.depth, stored.used(), stored.frames)


class Values:
    """The values that a set's files use, by what they may be."""

    def __init__(self) -> None:
        self._files: Counter[Depth] = Counter()
        self._first: dict[Depth, Path] = {}
        self._used: dict[Depth, Bounds] = {}

    def add(self, path: Path, depth: Depth, used: Bounds | None) -> None:
        """Counts one file."""
        self._files[depth] += 1
        self._first.setdefault(depth, path)
        if used:
            low, high = self._used.get(depth, used)
            self._used[depth] = min(low, used[0]), max(high, used[1])

    def _named(self, depth: Depth) -> str:
        """The number of files of a depth, and one of them."""
        return f"{self._files[depth]:,} files such as {legible(str(self._first[depth]))}"

    def check(self, setting: str | Bounds) -> None:
        """Raises BadInput where `data.range` does not fit the files."""
        if setting == "type":
            for depth in filter(lambda depth: depth.largest is None, self._used):
                low, high = map(number, self._used[depth])
                pair = f", or two numbers, such as 'data.range=[{low},{high}]'" if low != high else ""
                advice = f"set data.range=measured{pair}"
                if len(self._files) > 1:
                    advice = "save them as the other files of the set"
                raise BadInput(
                    f"data.range: {self._named(depth)} hold {depth.name} values, {low} to {high}, and their "
                    f"type does not say what is black and white: {advice}"
                )
            return
        if len(self._files) > 1:
            kinds = ", ".join(f"{self._named(depth)} of {depth.name}" for depth in self._files)
            raise BadInput(
                f"data.range: one range is for files of one depth, and the set holds {kinds}: "
                "save all alike, or leave data.range out"
            )
        if any(depth.upper for depth in self._files):
            raise BadInput(
                "data.range: colour of 16 bits a channel is read by its upper eight bits only: "
                "save the images with 8 bits a channel, scaled, and leave data.range out"
            )

    def bounds(self) -> Bounds:
        """The smallest and the largest value of all files.

        Raises:
            BadInput: no file could be read, or all values are equal.
        """
        low, high = next(iter(self._used.values()), (0, 0))
        if not low < high:
            raise BadInput("data.range=measured: no two values of the set differ")
        return low, high

    def notes(self, setting: str | Bounds, bounds: Bounds | None) -> list[str]:
        """What became 0 and 255 where that was measured, and a warning where most of a range is unused."""
        notes = []
        for depth, (low, high) in self._used.items():
            used, count = f"{number(low)} to {number(high)}", self._files[depth]
            if setting == "measured":
                notes.append(f"data.range=measured: {depth.name} values {used} become 0 to 255")
                continue
            black, white = bounds or (0, depth.largest or 0)
            if high > low and min(high, white) - max(low, black) < (white - black) / 2:
                assumed = f"{number(black)} to {number(white)}"
                notes.append(
                    f"data.range: warning: {count:,} {depth.name} files use the values {used} only, and "
                    f"{assumed} were taken for black to white, so that images have little contrast: "
                    + (_better(depth, low, high) if len(self._files) == 1 else "save all files alike, scaled")
                )
        return notes


def _better(depth: Depth, low: float, high: float) -> str:
    """What to do where most of a range is unused."""
    if depth.upper:
        return "save them with 8 bits a channel, scaled"
    bits = max(1, math.ceil(math.log2(high + 1))) if high > 0 else 0
    fits = low >= 0 and depth.largest is not None and 2**bits - 1 < depth.largest
    first, last = (0, 2**bits - 1) if fits else (low, high)
    return f"set 'data.range=[{number(first)},{number(last)}]' or data.range=measured"
