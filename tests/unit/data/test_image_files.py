"""Image files of any mode, depth, alpha and orientation decode to independently computed pixels."""

import io
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedlight.data.image_cache import Decoded, decode
from fedlight.data.image_file import crop_and_resize, read_image
from fedlight.runtime.errors import BadInput

ORIENTATION = 0x0112
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What each value of EXIF's orientation asks for; the axes are height and width."""
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=12)


class File(NamedTuple):
    """A file, what is in it, and the values of its type."""

    content: bytes
    values: np.ndarray  # (height, width) or (height, width, 3)
    alpha: np.ndarray | None  # 0..1
    white: float | None  # the largest value that the type holds
    negative: bool = False


def saved(image: Image.Image, kind: str, orientation: int, **more: Any) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if kind == "TIFF":
        more["tiffinfo"] = {ORIENTATION: orientation}
    elif kind in ("PNG", "WEBP"):
        exif[ORIENTATION] = orientation
        more["exif"] = exif
    if kind == "WEBP":
        more |= {"lossless": True, "exact": True}
    image.save(file, kind, **more)
    return file.getvalue()


def tiff(values: np.ndarray, bits: int, white: int, sample_format: int, orientation: int) -> bytes:
    """A grey TIFF without compression; `white` is its photometric interpretation, 0 or 1."""
    height, width = values.shape
    if bits == 12:
        rows = []
        for row in values.tolist():
            text = "".join(f"{value:012b}" for value in row)
            text += "0" * (-len(text) % 8)
            rows.append(int(text, 2).to_bytes(len(text) // 8, "big"))
        body = b"".join(rows)
    else:
        body = values.astype(values.dtype.newbyteorder("<")).tobytes()
    short, long = 3, 4
    tags = [
        *((256, long, width), (257, long, height), (258, short, bits), (259, short, 1), (262, short, white)),
        *((273, long, 8 + 2 + 12 * 11 + 4), (ORIENTATION, short, orientation), (277, short, 1)),
        *((278, long, height), (279, long, len(body)), (339, short, sample_format)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + body


def png16(values: np.ndarray, orientation: int) -> bytes:
    """A PNG of 16 bits a channel, shape (height, width, channels): 2 for grey and alpha, 3, or 4."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    exif = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"eXIf", exif), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def eight_bits(kind: str, mode: str, rng: np.random.Generator, size: tuple[int, int], turn: int) -> File:
    """BMP and PPM have no orientation: their files are turned before they are written."""
    depth = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    stored = rng.integers(0, 256, (*size, *depth), dtype=np.uint8)
    alpha = stored[..., -1] / 255 if mode.endswith("A") else None
    colour = stored[..., 0] if mode == "LA" else stored[..., :3] if mode == "RGBA" else stored
    turned = stored if kind not in ("BMP", "PPM") else np.ascontiguousarray(UPRIGHT[turn](stored))
    return File(saved(Image.fromarray(turned), kind, turn), colour, alpha, 255)


def palette(rng: np.random.Generator, size: tuple[int, int], turn: int, opacity: bool) -> File:
    stored = rng.integers(0, 9, size, dtype=np.uint8)
    colours, alphas = rng.integers(0, 256, (9, 3), dtype=np.uint8), rng.integers(0, 256, 9, dtype=np.uint8)
    image = Image.fromarray(stored, "L").convert("P")
    image.putpalette(colours.tobytes())
    image.putdata(stored.ravel().tolist())
    more = {"transparency": alphas.tobytes()} if opacity else {}
    content = saved(image, "PNG", turn, **more)
    return File(content, colours[stored], alphas[stored] / 255 if opacity else None, 255)


def keyed(mode: str, rng: np.random.Generator, size: tuple[int, int], turn: int) -> File:
    """A PNG of which one value is transparent."""
    if mode == "RGB":
        stored = rng.integers(0, 2, (*size, 3), dtype=np.uint8) * 200
        hidden, mask = (200, 0, 200), (stored == (200, 0, 200)).all(-1)
    else:
        stored = rng.integers(0, 3, size).astype(np.uint8 if mode == "L" else np.uint16) * 80
        hidden, mask = 80, stored == 80
    content = saved(Image.fromarray(stored), "PNG", turn, transparency=hidden)
    return File(content, stored, 1.0 - mask, 2 ** (8 * stored.dtype.itemsize) - 1)


def sixteen_colour(channels: int, rng: np.random.Generator, size: tuple[int, int], turn: int) -> File:
    stored = rng.integers(0, 2**16, (*size, channels)).astype(np.uint16)
    upper = (stored >> 8).astype(np.uint8)
    alpha = upper[..., -1] / 255 if channels != 3 else None
    return File(png16(stored, turn), upper[..., 0] if channels == 2 else upper[..., :3], alpha, 255)


def grey_tiff(
    dtype: Any, bits: int, white: int, rng: np.random.Generator, size: tuple[int, int], turn: int
) -> File:
    if np.issubdtype(dtype, np.floating):
        values, code = (rng.random(size) * 4 - 2).astype(dtype), 3
    else:
        bound = np.iinfo(dtype) if bits != 12 else np.iinfo(np.uint8)
        low, high = (0, 4096) if bits == 12 else (bound.min, bound.max + 1)
        values, code = rng.integers(low, high, size).astype(dtype), 2 if low < 0 else 1
    largest = 2**bits - 1 if bits <= 16 and code == 1 else None
    return File(tiff(values, bits, white, code, turn), values, None, largest, white == 0)


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int], int], File]] = {
    **{
        f"{mode} {kind}": (
            lambda rng, size, turn, kind=kind, mode=mode: eight_bits(kind, mode, rng, size, turn)
        )
        for kind, modes in {
            "PNG": ("L", "LA", "RGB", "RGBA"),
            "TIFF": ("L", "LA", "RGB", "RGBA"),
            "WEBP": ("RGB", "RGBA"),
            "BMP": ("L", "RGB"),
            "PPM": ("L", "RGB"),
        }.items()
        for mode in modes
    },
    "palette": lambda rng, size, turn: palette(rng, size, turn, False),
    "palette with opacities": lambda rng, size, turn: palette(rng, size, turn, True),
    "keyed grey": lambda rng, size, turn: keyed("L", rng, size, turn),
    "keyed RGB": lambda rng, size, turn: keyed("RGB", rng, size, turn),
    "keyed grey, 16 bits": lambda rng, size, turn: keyed("I;16", rng, size, turn),
    "grey and alpha, 16 bits": lambda rng, size, turn: sixteen_colour(2, rng, size, turn),
    "RGB, 16 bits": lambda rng, size, turn: sixteen_colour(3, rng, size, turn),
    "RGBA, 16 bits": lambda rng, size, turn: sixteen_colour(4, rng, size, turn),
    "grey, 12 bits": lambda *drawn: grey_tiff(np.uint16, 12, 1, *drawn),
    "grey, 16 bits": lambda *drawn: grey_tiff(np.uint16, 16, 1, *drawn),
    "grey, 16 bits, 0 is white": lambda *drawn: grey_tiff(np.uint16, 16, 0, *drawn),
    "grey, 16 bits, signed": lambda *drawn: grey_tiff(np.int16, 16, 1, *drawn),
    "grey, 32 bits": lambda *drawn: grey_tiff(np.uint32, 32, 1, *drawn),
    "grey, 32 bits, signed": lambda *drawn: grey_tiff(np.int32, 32, 1, *drawn),
    "grey, floating point": lambda *drawn: grey_tiff(np.float32, 32, 1, *drawn),
}
SEEDS = st.integers(0, 99)
TURNS = st.sampled_from(sorted(UPRIGHT))
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
BOUNDS = st.tuples(st.integers(-70_000, 70_000), st.integers(1, 70_000)).map(lambda b: (b[0], b[0] + b[1]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an example's file is written."""
    return tmp_path_factory.mktemp("example") / "image"


def pixels(path: Path, file: File, channels: int, bounds: tuple[float, float] | None) -> np.ndarray:
    """The central square of an image, not resized, shape (side, side, channels)."""
    path.write_bytes(file.content)
    stored = read_image(path, channels)
    square = crop_and_resize(stored.to_bytes(bounds), channels, min(file.values.shape[:2]))
    return square.transpose(1, 2, 0).astype(float)


def load(folder: Path, files: dict[str, bytes], range_: Any = "type", skip: bool = False) -> Decoded:
    """A set of images of one folder, 2x2, grey."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    paths = [folder / name for name in files]
    return decode("set", folder, paths, str(folder / "cache"), 2, 1, skip, range_)


def expected(file: File, turn: int, channels: int, bounds: tuple[float, float] | None) -> np.ndarray:
    """The same in floating point, not rounded, shape (side, side, channels)."""
    values = file.values.astype(float)
    if bounds:
        shown = np.clip((values - bounds[0]) / (bounds[1] - bounds[0]), 0, 1) * 255
    else:
        assert file.white is not None
        shown = np.floor(values / ((file.white + 1) / 256))
    if file.negative:
        shown = 255 - shown
    if channels == 1 and shown.ndim == 3:
        shown = shown @ (0.299, 0.587, 0.114)
    if channels == 3 and shown.ndim == 2:
        shown = np.stack([shown] * 3, -1)
    if file.alpha is not None:
        alpha = file.alpha if shown.ndim == 2 else file.alpha[..., None]
        shown = shown * alpha + 255 * (1 - alpha)
    shown = UPRIGHT[turn](shown)
    height, width = shown.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return shown[top : top + side, left : left + side].reshape(side, side, channels)


@pytest.mark.parametrize("kind", sorted(KINDS))
@EXAMPLES
@given(seed=SEEDS, size=SIZES, turn=TURNS, channels=st.sampled_from([1, 3]))
def test_pixels_are_those_of_the_file(
    place: Path, kind: str, seed: int, size: tuple[int, int], turn: int, channels: int
) -> None:
    file = KINDS[kind](np.random.default_rng(seed), size, turn)
    if file.white is None:
        return  # refused: below
    found, plain = pixels(place, file, channels, None), expected(file, turn, channels, None)
    exact = file.alpha is None and not (channels == 1 and file.values.ndim == 3)
    assert found.shape == plain.shape
    assert np.abs(found - plain).max() <= (0 if exact else 1.01)


@pytest.mark.parametrize("kind", sorted(KINDS))
@EXAMPLES
@given(seed=SEEDS, size=SIZES, turn=TURNS, bounds=BOUNDS)
def test_two_numbers_become_black_and_white_and_what_is_between_is_linear(
    place: Path, kind: str, seed: int, size: tuple[int, int], turn: int, bounds: tuple[float, float]
) -> None:
    file = KINDS[kind](np.random.default_rng(seed), size, turn)
    found, plain = pixels(place, file, 3, bounds), expected(file, turn, 3, bounds)
    assert np.abs(found - plain).max() <= (0.5001 if file.alpha is None else 1.01)


@pytest.mark.parametrize("kind", sorted(KINDS))
@EXAMPLES
@given(seed=SEEDS, size=SIZES)
def test_used_values_are_the_smallest_and_largest_that_are_seen(
    place: Path, kind: str, seed: int, size: tuple[int, int]
) -> None:
    file = KINDS[kind](np.random.default_rng(seed), size, 1)
    place.write_bytes(file.content)
    stored = read_image(place, 3)
    seen = file.values if file.alpha is None else file.values[file.alpha > 0]
    plain = (float(seen.min()), float(seen.max())) if seen.size else None
    if plain and stored.depth.upper_bits_only:
        plain = (256 * plain[0], 256 * plain[1] + 255)
    assert stored.used_values() == plain


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(KINDS)), st.integers(0, 99), st.integers(0, 400), st.integers(0, 255)
        ),
        min_size=8,
        max_size=8,
    )
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_file_is_read_or_named(damages: list[tuple[str, int, int, int]]) -> None:
    files = {}
    for number, (kind, seed, position, value) in enumerate(damages):
        content = bytearray(KINDS[kind](np.random.default_rng(seed), (6, 7), 1).content)
        content[position % len(content)] = value
        files[str(number)] = bytes(content)
    with tempfile.TemporaryDirectory() as folder:
        try:
            assert load(Path(folder), files, skip=True).pixels.shape == (8, 1, 2, 2)
        except BadInput as error:
            assert str(error).startswith("data.range: ")  # noqa: PT017


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_values_that_do_not_fit_the_range_are_rejected(tmp_path: Path, kind: str) -> None:
    file = KINDS[kind](np.random.default_rng(0), (4, 4), 1)
    colour = "16 bits" in kind and ("RGB" in kind or "alpha" in kind)
    if file.white is None:
        low, high = (f"{value:.6g}" if "float" in kind else f"{value}" for value in extent(file.values))
        message = rf"files such as .*image hold .* {low} to {high}, .* 'data\.range=\[{low},{high}\]'"
        with pytest.raises(BadInput, match=message):
            load(tmp_path / "set", {"image": file.content})
    for range_ in ("measured", (0, 100)):
        if colour:
            with pytest.raises(BadInput, match=r"colour of 16 bits .* upper eight bits only"):
                load(tmp_path / "set", {"image": file.content}, range_)
        else:
            assert load(tmp_path / "set", {"image": file.content}, range_).read.all()


def extent(values: np.ndarray) -> tuple[Any, Any]:
    return values.min(), values.max()


def grey16(values: np.ndarray) -> bytes:
    return saved(Image.fromarray(values.astype(np.uint16)), "PNG", 1)


def test_the_range_is_measured_over_the_set_and_not_over_an_image(tmp_path: Path) -> None:
    dark, light = np.full((2, 2), 1000), np.full((2, 2), 3000)
    light[0, 0] = 4000
    files = {"dark": grey16(dark), "light": grey16(light)}
    found = load(tmp_path / "set", files, "measured")
    assert found.pixels.flatten().tolist() == [0, 0, 0, 0, 255, 170, 170, 170]  # 2000 / 3000 of 255
    assert found.notes == ("data.range=measured: 16-bit values 1000 to 4000 become 0 to 255",)
    files["light"] = grey16(light + 2000)  # one image changes, and with it the others
    files["dark"] = grey16(np.array([[1000, 2000], [1000, 1000]]))
    assert load(tmp_path / "set", files, "measured").pixels[0].flatten().tolist() == [0, 51, 0, 0]


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ((266, 3007), r"use the values 266 to 3007 only, and 0 to 65535 .* 'data\.range=\[0,4095\]'"),
        ((0, 4095), r"use the values 0 to 4095 only, .* 'data\.range=\[0,4095\]'"),
        ((0, 4096), r"'data\.range=\[0,8191\]'"),
        ((0, 1), r"'data\.range=\[0,1\]'"),
        ((65000, 65535), r"'data\.range=\[65000,65535\]' or data\.range=measured"),
        ((0, 32767), r"'data\.range=\[0,32767\]'"),
        ((0, 32768), None),
        ((100, 65535), None),
    ],
)
def test_a_range_that_is_mostly_unused_gives_a_warning_with_numbers(
    tmp_path: Path, values: tuple[int, int], advice: str | None
) -> None:
    files = {str(n): grey16(np.full((2, 2), value)) for n, value in enumerate(values)}
    for _ in range(2):  # decoded, and from the cache
        notes = load(tmp_path / "set", files).notes
        assert len(notes) == (advice is not None)
        if advice:
            assert re.search(
                rf"^data\.range: warning: 2 16-bit files {advice}" if "use" in advice else advice, notes[0]
            )


def test_twelve_bits_in_sixteen_become_the_bytes_of_their_upper_eight_by_two_numbers(tmp_path: Path) -> None:
    values = np.array([[0, 1000], [2048, 4095]])
    assert load(tmp_path / "set", {"a": grey16(values)}).pixels.flatten().tolist() == [0, 3, 8, 15]
    found = load(tmp_path / "set", {"a": grey16(values)}, (0, 4095))
    assert found.pixels.flatten().tolist() == [round(v * 255 / 4095) for v in values.ravel()]
    assert found.notes == ()


def test_files_of_two_depths_are_brought_to_no_range(tmp_path: Path) -> None:
    eight = saved(Image.new("L", (2, 2), 200), "PNG", 1)
    files = {"a": eight, "b": grey16(np.full((2, 2), 200 * 256))}
    assert load(tmp_path / "set", files).pixels.unique().tolist() == [200]
    dark = grey16(np.array([[0, 4095], [0, 0]]))
    (note,) = load(tmp_path / "dark", {**files, "b": dark}).notes
    assert re.search(r"1 16-bit files use the values 0 to 4095 only, .*: save all files alike, scaled$", note)
    with pytest.raises(BadInput, match=r"set holds 1 files such as .*a of 8-bit, 1 files such as .*b of 16"):
        load(tmp_path / "set", files, "measured")


def test_further_frames_are_counted(tmp_path: Path) -> None:
    stack = io.BytesIO()
    slices = [Image.new("L", (2, 2), grey) for grey in (10, 20, 30)]
    slices[0].save(stack, "TIFF", save_all=True, append_images=slices[1:])
    found = load(tmp_path / "set", {"a": stack.getvalue()})
    assert (found.pixels.unique().tolist(), found.further_frames) == ([10], 2)
