"""Data sets: loaded images and labels are those of the files, and broken files are named."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from fedlight.compose import ROOT, register_resolvers
from fedlight.config import validate
from fedlight.data import celeba, cifar10, data_name, digits, file_hashes, fmnist, image_cache, image_folder
from fedlight.runs.identity import cell_folder
from fedlight.runtime.errors import BadInput

BLUE, GREEN, RED = (0, 0, 255), (0, 255, 0), (255, 0, 0)


# ---- digits


def test_a_fifth_of_the_digits_of_each_class_is_for_testing() -> None:
    data = digits.load()
    assert (len(data.train), len(data.test)) == (1437, 360)
    of_test, of_all = (np.bincount(x) for x in (data.test.labels, [*data.train.labels, *data.test.labels]))
    assert np.abs(of_test - of_all * 360 / 1797).max() < 1


def test_the_split_of_the_digits_depends_on_no_global_seed() -> None:
    np.random.seed(1)  # noqa: NPY002
    first = digits.load()
    np.random.seed(2)  # noqa: NPY002
    second = digits.load()
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert np.array_equal(first.test.labels, second.test.labels)


def test_digits_use_the_whole_range_of_a_byte() -> None:
    pixels = digits.load().train.pixels
    assert pixels.shape[1:] == (1, 8, 8)
    assert len(pixels.unique()) == 17  # scikit-learn's are 0..16
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)


# ---- Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Three training images and two test images, 4x5 pixels, pixel = position in the file."""
    for prefix, count in (("train", 3), ("t10k", 2)):
        pixels = np.arange(count * 20, dtype=np.uint8).reshape(count, 4, 5)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(pixels))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_row_by_row_plain_or_gzipped(idx_folder: Path, zipped: bool) -> None:
    for path in list(idx_folder.iterdir()) if zipped else []:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    data = fmnist.load(str(idx_folder), cache="")
    assert data.train.pixels.flatten().tolist() == list(range(60))
    assert data.train.pixels.shape == (3, 1, 4, 5)
    assert data.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file t10k-images-idx3-ubyte"),
        (b"", "no IDX file"),
        (idx(np.zeros((2, 4), np.uint8)), "no IDX file"),
        (b"\0\0\x0d" + idx(np.zeros((2, 4, 5), np.uint8))[3:], "no IDX file"),  # of floats
        (idx(np.zeros((2, 4, 5), np.uint8))[:-1], "truncated: 39 of 40 bytes"),
        (idx(np.zeros((2, 4, 5), np.uint8)) + b"\0", "41 of 40 bytes"),
    ],
)
def test_a_broken_idx_file_is_named(idx_folder: Path, content: bytes | None, message: str) -> None:
    path = idx_folder / "t10k-images-idx3-ubyte"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        fmnist.load(str(idx_folder), cache="")
    assert str(idx_folder) in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b[:12] + b"\xff" * 9 + b[21:], lambda b: b"no"]
)
def test_a_broken_gzip_file_is_named(idx_folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = idx_folder / "train-labels-idx1-ubyte"
    path.with_name(f"{path.name}.gz").write_bytes(damage(gzip.compress(path.read_bytes())))
    with pytest.raises(BadInput, match=r"train-labels-idx1-ubyte\.gz cannot be read"):
        fmnist.load(str(idx_folder), cache="")


@pytest.mark.usefixtures("fmnist")
def test_fashion_mnist_has_6000_and_1000_images_a_class() -> None:
    data = fmnist.load(None, cache="")
    assert data.train.pixels.shape == (60_000, 1, 28, 28)
    assert np.bincount(data.train.labels).tolist() == [6000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert len(data.classes) == 10


# ---- CIFAR-10


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the files of CIFAR-10."""

    dispatch = pickle._Pickler.dispatch | {
        bytes: lambda self, value: self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
    }


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def cifar10_row(image: int) -> np.ndarray:
    """Red, green, blue planes of 1,024 bytes, each row by row; all of them differ somewhere."""
    return ((np.arange(3072) * 7 + np.arange(3072) // 256 + image) % 256).astype(np.uint8)


def write_cifar10(root: Path, dump: Callable[[object], bytes] = python2_pickle) -> Path:
    """Two images a file, numbered on; the label of image i is i mod 10."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"class {label}".encode() for label in range(10)]
    (folder / "batches.meta").write_bytes(dump({b"label_names": names, b"num_vis": 3072}))
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        images = [2 * number, 2 * number + 1]
        rows = np.stack([cifar10_row(image) for image in images])
        batch = {b"batch_label": name.encode(), b"labels": [i % 10 for i in images], b"data": rows}
        (folder / name).write_bytes(dump(batch))
    return folder


@pytest.mark.parametrize("dump", [python2_pickle, lambda value: pickle.dumps(value, protocol=4)])
def test_cifar10_is_read_in_order_and_by_colour_planes(
    tmp_path: Path, dump: Callable[[object], bytes]
) -> None:
    write_cifar10(tmp_path, dump)
    data = cifar10.load(str(tmp_path), cache="")
    assert data.train.labels.tolist() == [*range(10)]
    assert data.test.labels.tolist() == [0, 1]
    assert data.train.pixels.shape == (10, 3, 32, 32)
    for image, channel, y, x in [(0, 0, 0, 1), (3, 1, 5, 9), (9, 2, 31, 30)]:
        assert data.train.pixels[image, channel, y, x] == cifar10_row(image)[1024 * channel + 32 * y + x]
    assert torch.equal(data.test.pixels[1].flatten(), torch.from_numpy(cifar10_row(11)))
    assert data.classes == tuple(f"class {label}" for label in range(10))


class Calls:
    """Pickles as a call of the function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize(
    "attack",
    [
        lambda marker: Calls(os.system, f"touch {marker}"),
        lambda marker: Calls(exec, f"open({str(marker)!r}, 'w')"),
        lambda marker: Calls(np.save, str(marker), 0),
    ],
)
def test_a_pickle_that_calls_anything_is_refused_and_calls_nothing(
    tmp_path: Path, name: str, attack: Callable[[Path], Calls]
) -> None:
    folder, marker = write_cifar10(tmp_path), tmp_path / "marker.npy"
    content = pickle.dumps({b"data": attack(marker), b"labels": []}, protocol=2)
    (folder / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"{name} cannot be read \(it refers to "):
        cifar10.load(str(tmp_path), cache="")
    assert not marker.exists()
    pickle.loads(content)  # noqa: S301
    assert marker.exists()  # the attack is one


def test_a_function_reached_through_an_allowed_one_is_refused(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(
        pickle.PROTO + b"\4" + b"\x8c\5numpy" + b"\x8c\x0cndarray.dump" + pickle.STACK_GLOBAL + pickle.STOP
    )
    with pytest.raises(BadInput, match=r"numpy\.ndarray\.dump"):
        cifar10.load(str(tmp_path), cache="")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_cifar10_file_is_named(tmp_path: Path, kept: float) -> None:
    path = write_cifar10(tmp_path) / "data_batch_2"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(BadInput, match="data_batch_2 cannot be read"):
        cifar10.load(str(tmp_path), cache="")


@pytest.mark.parametrize(
    "batch",
    [
        [],
        {},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]},
        {b"data": np.zeros((1, 784), np.uint8), b"labels": [0]},
        {b"data": np.zeros((1, 3072), np.float32), b"labels": [0]},
        {b"data": np.zeros((2, 3072), object), b"labels": [0, 0]},
        {b"data": np.asfortranarray(np.zeros((2, 3072), np.uint8)), b"labels": [0, 0]},
        {b"data": np.ndarray, b"labels": []},
        {b"data": np.dtype("u1"), b"labels": []},
    ],
)
def test_a_pickle_of_something_else_than_cifar10_is_named(tmp_path: Path, batch: object) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(python2_pickle(batch))
    with pytest.raises(BadInput, match=r"test_batch is no (file|batch) of CIFAR-10"):
        cifar10.load(str(tmp_path), cache="")


def test_a_missing_cifar10_file_is_named(tmp_path: Path) -> None:
    (write_cifar10(tmp_path) / "data_batch_5").unlink()
    with pytest.raises(BadInput, match=r"no file data_batch_5 in .*cifar-10-batches-py"):
        cifar10.load(str(tmp_path), cache="")


def test_cifar10_is_downloaded_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def fetch(url: str, folder: str, filename: str, md5: str) -> None:
        downloads.append((filename, md5))
        write_cifar10(Path(folder))

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    cache = tmp_path / "not yet" / "there"
    assert len(cifar10.load(None, str(cache)).train) == len(cifar10.load(None, str(cache)).train) == 10
    assert downloads == [("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")]


def test_a_failed_download_is_reported_and_leaves_no_partial_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str, folder: str, **_: str) -> None:
        write_cifar10(Path(folder))
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fail)
    with pytest.raises(BadInput, match=r"CIFAR-10 .* \(no route to host\): set data\.root"):
        cifar10.load(None, str(tmp_path))
    assert not list(tmp_path.glob("*/"))


def test_a_root_without_the_folder_of_the_data_set_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no folder cifar-10-batches-py in /"):
        cifar10.load(str(tmp_path), cache="")
    with pytest.raises(BadInput, match=r"no folder celeba in /"):
        celeba.load(str(tmp_path), "", 64, 3, CHOSEN)


# ---- CelebA

ATTRIBUTES = ("Bald", "Male", "Smiling", "Hat", "Young")
CHOSEN = ["Young", "Male", "Bald", "Hat"]


def face(inside: tuple[int, int, int]) -> Image.Image:
    """178x218 pixels: red but for the central 178x178."""
    image = Image.new("RGB", (178, 218), RED)
    image.paste(inside, (0, 20, 178, 198))
    return image


@pytest.fixture
def celeba_root(tmp_path: Path) -> Path:
    """Four faces, of which the third is for validation and the last for testing."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    colours = {"000001": BLUE, "000002": GREEN, "000003": RED, "000004": GREEN}
    for name, colour in colours.items():
        face(colour).save(folder / "img_align_celeba" / f"{name}.jpg", quality=100, subsampling=0)
    (folder / "list_attr_celeba.txt").write_text(
        f"4\n{' '.join(ATTRIBUTES)} \n"
        "000001.jpg -1  1 -1 -1  1\n"  # Male, Young
        "000002.jpg  1 -1  1 -1 -1\n"  # Bald, Smiling
        "000003.jpg  1  1  1  1  1\n"
        "000004.jpg -1 -1 -1 -1 -1\n"
    )
    (folder / "list_eval_partition.txt").write_text(
        "000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n"
    )
    return tmp_path


def load_celeba(root: Path, attributes: list[str] | None = CHOSEN, channels: int = 3) -> Any:
    return celeba.load(str(root), str(root / "cache"), 64, channels, attributes)


def test_celeba_trains_on_part_0_and_tests_on_part_2(celeba_root: Path) -> None:
    data = load_celeba(celeba_root)
    assert data.train.pixels.shape == (2, 3, 64, 64)
    assert data.test.pixels.shape == (1, 3, 64, 64)
    centres = [*data.train.pixels[:, :, 32, 32], *data.test.pixels[:, :, 32, 32]]
    assert [int(centre.argmax()) for centre in centres] == [2, 1, 1]  # blue, green; green


def test_celeba_is_cut_to_the_central_178(celeba_root: Path) -> None:
    pixels = load_celeba(celeba_root).train.pixels.int()
    blue = torch.tensor(BLUE).view(3, 1, 1)
    assert (pixels[0] - blue).abs().max() <= 8  # JPEG is that exact; a row of the border would add 255/3


def test_a_celeba_label_has_a_bit_for_each_attribute(celeba_root: Path) -> None:
    data = load_celeba(celeba_root)
    assert data.train.labels.tolist() == [0b0011, 0b0100]  # Young and Male; Bald
    assert data.test.labels.tolist() == [0]
    assert len(data.classes) == len(set(data.classes)) == 16
    assert [data.classes[label] for label in (0, 3, 4, 15)] == [
        "none",
        "Young+Male",
        "Bald",
        "+".join(CHOSEN),
    ]


@pytest.mark.parametrize(
    "attributes",
    [None, [], CHOSEN[:3], list(ATTRIBUTES), [*CHOSEN[:3], "Tall"], [*CHOSEN[:3], CHOSEN[0]]],
)
def test_attributes_that_are_not_four_known_ones_are_rejected(
    celeba_root: Path, attributes: list[str] | None
) -> None:
    with pytest.raises(
        BadInput, match=f"data.attributes must be 4 different ones of {', '.join(ATTRIBUTES)}"
    ):
        load_celeba(celeba_root, attributes)


def test_other_attributes_need_no_new_decoding(celeba_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_celeba(celeba_root)
    monkeypatch.setattr(image_cache, "_decode", None)
    after = load_celeba(celeba_root, list(ATTRIBUTES[:4]))
    assert torch.equal(before.train.pixels, after.train.pixels)
    assert after.train.labels.tolist() == [0b0010, 0b0101]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list_attr_celeba.txt", None, "list_attr_celeba.txt cannot be read"),
        ("list_attr_celeba.txt", "4\n", "truncated"),
        (
            "list_attr_celeba.txt",
            f"4\n{' '.join(ATTRIBUTES)}\n000001.jpg 1 1 1\n",
            "broken at '000001.jpg 1 1",
        ),
        ("list_attr_celeba.txt", f"4\n{' '.join(ATTRIBUTES)}\n000001.jpg 1 1 1 1 1\n", "lacks 000002.jpg"),
        ("list_eval_partition.txt", None, "list_eval_partition.txt cannot be read"),
        ("list_eval_partition.txt", "000001.jpg 0\n000002.jpg\n", "broken at '000002.jpg'"),
        ("list_eval_partition.txt", "000001.jpg 0\n000002.jpg 7\n", "broken at '000002.jpg 7'"),
        ("list_eval_partition.txt", "000001.jpg 0\n000002.jpg 1\n", "must name images to train on"),
        ("img_align_celeba/000002.jpg", None, r"000002\.jpg \(No such file or directory\)"),
        ("img_align_celeba/000002.jpg", "no image", "000002.jpg \\("),
    ],
)
def test_a_broken_celeba_file_is_named(
    celeba_root: Path, name: str, content: str | None, message: str
) -> None:
    path = celeba_root / "celeba" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=message):
        load_celeba(celeba_root)


def test_a_failed_download_of_celeba_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the quota is used up")

    monkeypatch.setattr("torchvision.datasets.CelebA", fail)
    with pytest.raises(
        BadInput,
        match=r"CelebA .* \(the quota is used up\): pip install .*fedlight\[celeba\].* or set data\.root",
    ):
        celeba.load(None, str(tmp_path), 64, 3, CHOSEN)


# ---- a folder of images


def write_images(folder: Path, greys: range, suffix: str = ".png") -> None:
    """6x4 pixels of one grey each, which names the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for grey in greys:
        Image.new("L", (6, 4), grey).save(folder / f"{grey:03d}{suffix}")


def load_folder(root: Path, image_size: int = 4, channels: int = 1) -> Any:
    return image_folder.load(str(root), str(root.parent / "cache"), image_size, channels)


def greys(images: Any) -> list[int]:
    return images.pixels[:, 0, 0, 0].tolist()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class a holds greys 0..9, class b 100..119, class c 200..204."""
    for name, values in {"a": range(10), "b": range(100, 120), "c": range(200, 205)}.items():
        write_images(tmp_path / "pictures" / name, values)
    return tmp_path / "pictures"


def test_a_fifth_of_each_class_of_a_folder_is_for_testing(pictures: Path) -> None:
    data = load_folder(pictures)
    assert data.classes == ("a", "b", "c")
    assert np.bincount(data.train.labels).tolist() == [8, 16, 4]
    assert np.bincount(data.test.labels).tolist() == [2, 4, 1]
    assert sorted(greys(data.train) + greys(data.test)) == [*range(10), *range(100, 120), *range(200, 205)]
    for images in (data.train, data.test):
        assert [grey // 100 for grey in greys(images)] == images.labels.tolist()


def test_the_split_of_a_folder_depends_on_its_names_only(pictures: Path, tmp_path: Path) -> None:
    for path in sorted(pictures.rglob("*.png"), reverse=True):
        copy = tmp_path / "elsewhere" / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    np.random.seed(7)  # noqa: NPY002
    first, second = load_folder(pictures), load_folder(tmp_path / "elsewhere")
    assert greys(first.train) == greys(second.train)
    assert greys(first.test) == greys(second.test)


def test_the_first_images_of_a_folder_are_of_all_classes(pictures: Path) -> None:
    assert set(load_folder(pictures).train.first(12).labels) == {0, 1, 2}


def test_the_only_image_of_a_class_is_trained_on(pictures: Path) -> None:
    write_images(pictures / "d", range(250, 251))
    data = load_folder(pictures)
    assert np.bincount(data.train.labels).tolist() == [8, 16, 4, 1]
    assert np.bincount(data.test.labels).tolist() == [2, 4, 1]


def test_each_class_of_two_images_has_one_for_testing(tmp_path: Path) -> None:
    for label in range(5):
        write_images(tmp_path / "pairs" / str(label), range(2 * label, 2 * label + 2))
    data = load_folder(tmp_path / "pairs")
    assert sorted(data.train.labels) == sorted(data.test.labels) == [0, 1, 2, 3, 4]


def test_images_without_sub_folders_are_one_class(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", range(10))
    data = load_folder(tmp_path / "flat")
    assert data.classes == ("all",)
    assert (len(data.train), len(data.test)) == (8, 2)


def test_images_in_nested_folders_count_and_hidden_ones_do_not(pictures: Path) -> None:
    write_images(pictures / "a" / "more" / "still", range(10, 20), ".BMP")
    write_images(pictures / ".trash", range(50, 60))
    (pictures / "a" / "._000.png").write_text("what macOS leaves")
    (pictures / "a" / "notes.txt").write_text("no image")
    data = load_folder(pictures)
    assert len(data.classes) == 3
    assert len(data.train) + len(data.test) == 45


def test_images_are_cut_to_their_central_square(tmp_path: Path) -> None:
    folder = tmp_path / "wide_and_tall"
    folder.mkdir()
    wide = Image.new("RGB", (12, 8), RED)
    wide.paste(GREEN, (2, 0, 10, 8))
    wide.save(folder / "0.png")
    wide.rotate(90, expand=True).save(folder / "1.png")
    data = load_folder(folder, image_size=8, channels=3)
    green = torch.tensor(GREEN).view(3, 1, 1).expand(3, 8, 8)
    assert torch.equal(data.train.pixels[0].int(), green)
    assert torch.equal(data.test.pixels[0].int(), green)


def test_images_are_shrunk_with_antialiasing(tmp_path: Path) -> None:
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    for name in "01":
        (tmp_path / "boards").mkdir(exist_ok=True)
        Image.fromarray(board).save(tmp_path / "boards" / f"{name}.png")
    pixels = load_folder(tmp_path / "boards", image_size=8).train.pixels.int()
    assert (pixels - 128).abs().max() <= 16  # without, 0 and 255 would survive


def test_images_are_rotated_by_their_exif_orientation(tmp_path: Path) -> None:
    picture, exif = Image.new("L", (8, 8), 0), Image.Exif()
    picture.paste(255, (0, 0, 8, 4))  # white above, until turned by a quarter clockwise
    exif[0x0112] = 6
    for name in "01":
        (tmp_path / "turned").mkdir(exist_ok=True)
        picture.save(tmp_path / "turned" / f"{name}.png", exif=exif)
    (pixels,) = load_folder(tmp_path / "turned", image_size=8).train.pixels[:, 0]
    assert pixels[0].tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_mode_become_grey_or_rgb(tmp_path: Path, mode: str, channels: int) -> None:
    for name in "01":
        (tmp_path / "modes").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / "modes" / f"{name}.png")
    pixels = load_folder(tmp_path / "modes", channels=channels).train.pixels
    assert pixels.shape == (1, channels, 4, 4)
    assert pixels.unique().tolist() == [255]


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_rejected(pictures: Path, channels: int) -> None:
    with pytest.raises(BadInput, match=r"data.channels must be 1 \(grey\) or 3 \(RGB\)"):
        load_folder(pictures, channels=channels)


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


def not_finite(path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path, "TIFF")


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(b""), lambda path: path.write_text("%!PS-Adobe"), truncated, not_finite],
)
def test_an_unreadable_image_is_named_and_nothing_is_cached(
    pictures: Path, damage: Callable[[Path], object]
) -> None:
    damage(pictures / "b" / "107.png")
    with pytest.raises(BadInput, match=r"1 of \d+ files cannot be read .*b/107\.png \("):
        load_folder(pictures)
    assert not list(pictures.parent.glob("cache/**/*.npy"))


def test_images_of_sixteen_bits_are_read_by_their_upper_eight(pictures: Path) -> None:
    before = load_folder(pictures)
    for path in pictures.rglob("*.png"):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 256 + 77).save(path)
        assert Image.open(path).mode.startswith("I")
    after = load_folder(pictures)
    assert torch.equal(after.train.pixels, before.train.pixels)
    assert torch.equal(after.test.pixels, before.test.pixels)


def test_files_that_cannot_be_read_are_all_named_or_left_out(pictures: Path) -> None:
    whole = load_folder(pictures)
    shown = sorted([*greys(whole.train), *greys(whole.test)])
    broken = [pictures / "b" / "107.png", *sorted((pictures / "a").glob("*.png"))[:1]]
    lost = [int(np.asarray(Image.open(path).convert("L"))[0, 0]) for path in broken]
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(BadInput) as refusal:
        load_folder(pictures)
    assert all(str(path) in str(refusal.value) for path in broken)
    for _ in range(2):  # decoded, and from the cache
        left = image_folder.load(str(pictures), str(pictures.parent / "cache"), 4, 1, skip_unreadable=True)
        assert sorted([*greys(left.train), *greys(left.test), *lost]) == shown
    with pytest.raises(BadInput, match="2 of"):
        load_folder(pictures)


def test_a_folder_without_images_is_rejected(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no images \(\.jpg, .*\) in .*empty"):
        load_folder(tmp_path / "empty")
    with pytest.raises(BadInput, match=r"no folder .*nowhere"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"set data\.root=FOLDER"):
        image_folder.load(None, str(tmp_path), 4, 1)
    (pictures / "z").mkdir()
    with pytest.raises(BadInput, match=r"no images \(\.jpg, .*\) in .*pictures/z"):
        load_folder(pictures)


def test_images_beside_sub_folders_are_rejected(pictures: Path) -> None:
    write_images(pictures, range(1))
    with pytest.raises(BadInput, match=r"both sub-folders and images such as 000\.png"):
        load_folder(pictures)


def test_a_folder_without_two_images_in_any_class_is_rejected(tmp_path: Path) -> None:
    write_images(tmp_path / "lonely" / "a", range(1))
    write_images(tmp_path / "lonely" / "b", range(1))
    with pytest.raises(BadInput, match=r"no class in .* has two images"):
        load_folder(tmp_path / "lonely")


# ---- the cache of decoded images


def test_decoded_images_are_mapped_and_never_written_to(pictures: Path) -> None:
    pixels = load_folder(pictures).train.pixels
    (cached,) = pictures.parent.glob("cache/**/*.npy")
    assert str(cached) in Path("/proc/self/maps").read_text()
    before = cached.read_bytes()
    pixels.zero_()
    assert cached.read_bytes() == before
    assert load_folder(pictures).train.pixels.any()


def test_images_are_decoded_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_folder(pictures)
    monkeypatch.setattr(image_cache, "_decode", None)
    second = load_folder(pictures)
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.test.pixels, second.test.pixels)


def test_decoding_is_silent_without_a_terminal(pictures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_folder(pictures)
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_decoded_anew(pictures: Path) -> None:
    assert 107 in (lambda data: greys(data.train) + greys(data.test))(load_folder(pictures))
    path = pictures / "b" / "107.png"
    before = path.stat()
    Image.new("L", (6, 4), 99).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size  # only the time tells
    data = load_folder(pictures)
    assert 107 not in greys(data.train) + greys(data.test)
    assert 99 in greys(data.train) + greys(data.test)


def test_another_size_or_number_of_channels_is_decoded_anew(pictures: Path) -> None:
    shapes = [(4, 1), (2, 1), (4, 3)]
    for image_size, channels in shapes * 2:
        pixels = load_folder(pictures, image_size, channels).train.pixels
        assert pixels.shape == (28, channels, image_size, image_size)
    assert len(list(pictures.parent.glob("cache/**/*.npy"))) == len(shapes)


@pytest.mark.parametrize("left", [b"", b"\x93NUMPY\1\0", None])
def test_a_damaged_cache_is_made_anew(pictures: Path, left: bytes | None) -> None:
    load_folder(pictures)
    (cached,) = pictures.parent.glob("cache/**/*.npy")
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-1] if left is None else left)
    load_folder(pictures)
    assert cached.read_bytes() == whole


def test_an_unwritable_cache_is_reported(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"data\.cache: .* set data\.cache or FEDLIGHT_CACHE"):
        image_folder.load(str(pictures), str(tmp_path / "file"), 4, 1)


def test_of_eight_processes_on_an_empty_cache_one_decodes_and_all_read(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    start, results, write = context.Barrier(8), context.SimpleQueue(), image_cache._write

    def counted(path: Path, *rest: Any) -> None:
        with (tmp_path / "decodings").open("a") as file:
            file.write("one\n")
        write(path, *rest)

    def work() -> None:
        start.wait(timeout=60)
        results.put(sorted(greys(load_folder(pictures).train)))

    monkeypatch.setattr(image_cache, "_write", counted)
    processes = [context.Process(target=work) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 8
    expected = sorted(greys(load_folder(pictures).train))
    assert [results.get() for _ in processes] == [expected] * 8
    assert (tmp_path / "decodings").read_text() == "one\n"
    assert len(list(tmp_path.glob("cache/**/*.npy"))) == 1


# ---- by command


def prepare(command: Callable[..., int], *arguments: str) -> int:
    unseen = ["evaluation.grid=0", "evaluation.samples=0"]
    return command("data=image_folder", "rounds=0", "clients=2", "logger=none", *unseen, *arguments)


@pytest.mark.slow
def test_two_folders_are_two_cells_even_of_the_same_name(
    command: Callable[..., int], pictures: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "other" / "pictures", range(10))
    cache = f"data.cache={tmp_path / 'cache'}"
    assert prepare(command, f"data.root={pictures}/", cache) == 0
    assert prepare(command, "data.root=other/pictures", cache) == 0
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/default/*/result.json"))]
    names = [result["data"] for result in results]
    assert [name.split("_")[0] for name in names] == ["pictures", "pictures"]
    assert names[0] != names[1]


def test_a_folder_that_moves_is_the_same_cell(
    command: Callable[..., int],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    assert prepare(command, f"data.root={pictures}", cache) == 0
    (tmp_path / "elsewhere").mkdir()
    pictures.rename(tmp_path / "elsewhere" / "pictures")
    assert prepare(command, "data.root=elsewhere/pictures", cache) == 0
    assert "done already" in capsys.readouterr().out


def test_a_missing_data_root_is_reported(
    command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert prepare(command) == 2
    message = capfd.readouterr().err
    assert "set data.root=FOLDER" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# ---- identity


def named(kind: str, root: Path | None, cache: Path) -> str:
    """As a command would name the data."""
    data_name.data_name.cache_clear()
    return data_name.data_name(kind, None if root is None else str(root), str(cache))


def test_other_images_of_the_same_names_and_sizes_are_another_cell(
    command: Callable[..., int], tmp_path: Path
) -> None:
    pictures, cache = tmp_path / "bitmaps", f"data.cache={tmp_path / 'cache'}"
    for label in "ab":
        write_images(pictures / label, range(6), ".bmp")
    assert prepare(command, f"data.root={pictures}", cache) == 0
    for path in pictures.rglob("*.bmp"):
        size = path.stat().st_size
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        assert path.stat().st_size == size
    assert prepare(command, f"data.root={pictures}", cache) == 0
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/default/*/result.json")]
    assert len({result["data"] for result in results}) == len({result["cell"] for result in results}) == 2


def test_files_are_hashed_once_and_again_where_they_changed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    content = file_hashes._content
    monkeypatch.setattr(file_hashes, "_content", lambda path: read.append(path.name) or content(path))
    first = named("image_folder", pictures, tmp_path / "cache")
    everything = len(read)
    assert everything == len([path for path in pictures.rglob("*") if path.is_file()])
    assert named("image_folder", pictures, tmp_path / "cache") == first
    assert len(read) == everything
    changed = next(pictures.rglob("*.png"))
    before = changed.stat()
    body = changed.read_bytes()
    changed.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert named("image_folder", pictures, tmp_path / "cache") != first
    assert read[everything:] == [changed.name]
    (tmp_path / "blocked").touch()  # no cache can be kept there
    assert named("image_folder", pictures, tmp_path / "blocked") == named(
        "image_folder", pictures, tmp_path / "cache"
    )


def test_known_data_are_recognised_by_their_files(idx_folder: Path, tmp_path: Path) -> None:
    other = named("fmnist", idx_folder, tmp_path)
    assert other.startswith("fmnist_")
    path = idx_folder / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = named("fmnist", idx_folder, tmp_path)
    assert changed not in (other, "fmnist")
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert named("fmnist", idx_folder, tmp_path).startswith("fmnist_")
    path.with_name(f"{path.name}.gz").unlink()
    assert named("fmnist", idx_folder, tmp_path) == "fmnist"  # the loader reports what is missing
    (tmp_path / "cifar").mkdir()
    write_cifar10(tmp_path / "cifar")
    assert named("cifar10", tmp_path / "cifar", tmp_path).startswith("cifar10_")
    assert named("cifar10", None, tmp_path / "empty") == "cifar10"
    assert named("celeba", None, tmp_path / "empty") == "celeba"


def test_other_faces_of_another_list_are_other_data(celeba_root: Path, tmp_path: Path) -> None:
    first = named("celeba", celeba_root, tmp_path / "cache")
    assert first.startswith("celeba_")
    image = next((celeba_root / "celeba").rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"0")
    assert named("celeba", celeba_root, tmp_path / "cache") != first


@pytest.mark.slow
@pytest.mark.usefixtures("fmnist")
def test_fashion_mnist_has_one_name_in_any_folder_zipped_or_not(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for path in fmnist.DEBIAN.glob("*.gz"):
        (tmp_path / "moved" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert named("fmnist", tmp_path / "moved", tmp_path) == named("fmnist", None, tmp_path) == "fmnist"


def test_the_hashes_of_published_files_are_those_of_torchvision() -> None:
    from torchvision.datasets import CIFAR10, CelebA

    cifar10_files = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    cifar10_files[CIFAR10.meta["filename"]] = CIFAR10.meta["md5"]
    assert data_name.KNOWN["cifar10"] == cifar10_files
    faces = {name: md5 for _, md5, name in CelebA.file_list}
    assert data_name.KNOWN["celeba"].items() <= faces.items()


@pytest.mark.parametrize(
    ("data", "cell"),
    [
        ("digits", "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b"),
        ("fmnist", "FULL-K5-fmnist-iid-tiny-R4-E8-s2023-6b75dce2"),
        ("cifar10", "FULL-K5-cifar10-iid-tiny-R4-E8-s2023-d78fdb78"),
        ("celeba", "FULL-K5-celeba-iid-tiny-R4-E8-s2023-7d1fdb5f"),
    ],
)
def test_a_cell_of_known_data_keeps_its_id(data: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_resolvers()
    for name in ("FMNIST", "CIFAR10", "CELEBA"):
        monkeypatch.delenv(f"FEDLIGHT_{name}", raising=False)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", [f"data={data}"])
    assert cell_folder(validate(config)).name == cell
