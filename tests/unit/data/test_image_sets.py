"""Folders of images: links, published splits, names, left-out files, and when the cache may be used."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedlight.data import data_name, image_cache, image_folder
from fedlight.data.data_config import DataConfig
from fedlight.runtime.errors import BadInput

Command = Callable[..., int]


def write_images(folder: Path, greys: range, suffix: str = ".png") -> Path:
    """8x8 pixels of one grey each, which names the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for grey in greys:
        Image.new("L", (8, 8), grey).save(folder / f"{grey:03d}{suffix}")
    return folder


def load(root: Path, **more: Any) -> Any:
    return image_folder.load(str(root), str(root.parent / "cache"), 8, 1, **more)


def greys(*splits: Any) -> list[int]:
    return sorted(grey for images in splits for grey in images.pixels[:, 0, 0, 0].tolist())


def named(root: Path) -> str:
    """As a command would name the data."""
    data_name.data_name.cache_clear()
    return data_name.data_name("image_folder", str(root), str(root.parent / "cache"))


# ---- links


def test_a_folder_without_links_keeps_its_name(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.png", "a/deep/Ü 3.JPG", "notes.csv", ".hidden/4.png", "a/._1.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert named(tmp_path / "pictures") == "pictures_71596f4f"


@pytest.mark.parametrize("at", ["class", "nested", "file", "root"])
def test_linked_files_are_loaded_and_hashed_like_files(tmp_path: Path, at: str) -> None:
    """Links to other images are another data set, though no name changes."""
    for store, first in (("one", 0), ("two", 100)):
        write_images(tmp_path / store / "a" / "more", range(first, first + 10))
    names = {}
    for store in ("one", "two"):
        root = tmp_path / "set"
        link, target = {
            "root": (root, tmp_path / store),
            "class": (root / "a", tmp_path / store / "a"),
            "nested": (root / "a" / "more", tmp_path / store / "a" / "more"),
            "file": (root / "a" / "more", tmp_path / store / "a" / "more"),
        }[at]
        link.parent.mkdir(parents=True, exist_ok=True)
        if at == "file":
            link.mkdir()
            for path in target.iterdir():
                (link / f"0{path.name[1:]}").symlink_to(path)
        else:
            link.symlink_to(target)
        names[store] = named(root)
        data = load(root)
        assert greys(data.train, data.test) == greys_of(tmp_path / store)
        real = tmp_path / "real" / "set"
        shutil.copytree(root, real)
        assert named(real) == names[store]
        shutil.rmtree(real.parent)
        root.unlink() if at == "root" else shutil.rmtree(root)
    assert names["one"] != names["two"]


def greys_of(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.rglob("*.png"))


def test_a_link_back_to_a_folder_above_it_is_left_out_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_images(root / "a", range(10))
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    data = load(root)
    assert greys(data.train, data.test) == [*range(10)]
    assert "left out: 1 link back to a folder above it" in data.notes[0]
    assert named(root).startswith("set_")


def test_a_folder_linked_from_two_classes_counts_in_both(tmp_path: Path) -> None:
    write_images(tmp_path / "store", range(10))
    (tmp_path / "set").mkdir()
    for label in "ab":
        (tmp_path / "set" / label).symlink_to(tmp_path / "store")
    data = load(tmp_path / "set")
    assert len(data.train) + len(data.test) == 20


def test_a_link_that_leads_nowhere_is_named_or_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "set" / "a", range(10))
    (tmp_path / "set" / "a" / "010.png").symlink_to(tmp_path / "gone.png")
    before = named(tmp_path / "set")
    with pytest.raises(BadInput, match=r"1 of 11 files .*010\.png \(No such file or directory\)"):
        load(tmp_path / "set")
    assert "left out: 1 unreadable image" in load(tmp_path / "set", skip_unreadable=True).notes[0]
    write_images(tmp_path, range(200, 201))
    (tmp_path / "200.png").rename(tmp_path / "gone.png")
    assert named(tmp_path / "set") != before
    assert 200 in greys(*splits(load(tmp_path / "set")))


def splits(data: Any) -> tuple[Any, Any]:
    return data.train, data.test


# ---- the cache


@pytest.mark.parametrize("how", ["in place", "renamed over it"])
def test_other_content_of_the_same_size_and_time_is_seen(tmp_path: Path, how: str) -> None:
    root = tmp_path / "set"
    write_images(root / "a", range(10), ".bmp")
    path = root / "a" / "003.bmp"
    os.utime(path, (0, 0))
    before, size = named(root), path.stat().st_size
    assert 3 in greys(*splits(load(root)))
    other = path if how == "in place" else tmp_path / "other.bmp"
    Image.new("L", (8, 8), 77).save(other)
    os.utime(other, (0, 0))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime) == (size, 0)
    assert named(root) != before
    assert {3, 77}.intersection(greys(*splits(load(root)))) == {77}


def test_cached_hashes_of_an_older_format_are_computed_anew(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set" / "a", range(3)).parent
    name = named(root)
    (notes,) = (tmp_path / "cache" / "hashes").glob("*.json")
    old = {key: [*value[:2], "0" * 64, "0" * 32] for key, value in json.loads(notes.read_text()).items()}
    notes.write_text(json.dumps(old))
    assert named(root) == name


def test_images_that_move_are_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(write_images(tmp_path / "set" / "a", range(10)).parent)
    (tmp_path / "set").rename(tmp_path / "moved")
    monkeypatch.setattr(image_cache, "_decode", None)
    assert greys(*splits(load(tmp_path / "moved"))) == greys(*splits(first))


# ---- train, test and validation


@pytest.mark.parametrize(
    ("train", "test", "val"),
    [
        ("train", "test", "val"),
        ("Training", "Testing", "Validation"),
        ("TRAIN", "TEST", None),
        ("training_set", "test_set", "dev"),
        ("train2017", "test2017", "valid"),
    ],
)
def test_the_test_images_of_a_published_set_are_its_test_images(
    tmp_path: Path, train: str, test: str, val: str | None
) -> None:
    root = tmp_path / "chest"
    parts = {train: 0, test: 100} | ({val: 200} if val else {})
    for part, first in parts.items():
        write_images(root / part / "normal", range(first, first + 8))
        write_images(root / part / "sick" / "more", range(first + 50, first + 54))
    data = load(root)
    assert data.classes == ("normal", "sick")
    assert greys(data.train) == [*range(8), *range(50, 54)]
    assert greys(data.test) == [*range(100, 108), *range(150, 154)]
    for images in (data.train, data.test):
        assert [grey % 100 // 50 for grey in images.pixels[:, 0, 0, 0].tolist()] == images.labels.tolist()
    assert set(data.train.first(8).labels) == {0, 1}  # as data.limit takes them
    left_out = f"12 images in {val}" if val else "nothing"
    assert data.notes == (
        f"data.root {root}: 12 images to train on, 12 to test on; 2 classes: normal 16, sick 8; "
        f"left out: {left_out}",
    )
    flat = tmp_path / "flat" / "chest"
    shutil.copytree(root, flat)
    (flat / test).rename(flat / "other")
    assert named(root) != named(flat)


def test_a_published_set_is_another_one_than_its_folders_as_classes(tmp_path: Path) -> None:
    """Its name is not that under which earlier versions trained on its test images."""
    root = tmp_path / "set"
    for part in ("train", "test"):
        write_images(root / part / "a", range(3))
    files = sorted(root.rglob("*.png"))
    assert named(root) != f"set_{data_name.folder_digest(root, files, str(tmp_path / 'cache'))}"


def test_parts_of_a_set_without_classes_are_used_as_such(tmp_path: Path) -> None:
    write_images(tmp_path / "set" / "train", range(5))
    write_images(tmp_path / "set" / "test", range(100, 103))
    data = load(tmp_path / "set")
    assert (data.classes, greys(data.train), greys(data.test)) == (("all",), [*range(5)], [100, 101, 102])


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (["train/a", "val/a"], r"rename the one to test on to test, or set data\.root=.*/set/train"),
        (["test/a", "val/a"], r"rename the one to train on to train"),
        (["train/a", "test/a", "extra/a"], r"move extra elsewhere, or set data\.root=.*/set/train"),
        (["trainA", "trainB", "testA", "testB"], r"keep one folder to train on and one to test on"),
        (["train/a", "train/b", "test"], r"only one of them has a folder for each class"),
        (["train/a", "test/a", "test/b"], r"set/test holds the class b, and .*set/train has no images of it"),
        (["train/a", "test/a", "."], r"both sub-folders and images such as 000\.png"),
        (["chest/train/a", "chest/test/a"], r"set data\.root=.*/set/chest"),
        (["bottle/train/good", "bottle/test/bad", "wood/train/good", "wood/test/bad"], r"set/bottle holds"),
    ],
)
def test_ambiguous_parts_of_a_set_are_rejected_with_advice(
    tmp_path: Path, folders: list[str], advice: str
) -> None:
    for folder in folders:
        write_images(tmp_path / "set" / folder, range(4))
    with pytest.raises(BadInput, match=advice):
        load(tmp_path / "set")
    assert named(tmp_path / "set").startswith("set_")  # and the refusal is the loader's


@pytest.mark.parametrize(
    "classes", [["bus", "train"], ["train"], ["test", "tube"], ["bullet_train", "test_tube"]]
)
def test_classes_may_be_named_train_or_test(tmp_path: Path, classes: list[str]) -> None:
    for label in classes:
        write_images(tmp_path / "set" / label, range(10))
    assert load(tmp_path / "set").classes == tuple(classes)


# ---- what is left out


def test_left_out_files_are_counted_by_kind(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_images(root / "a", range(10))
    write_images(root / "b" / "deep", range(20, 30))
    hidden = ("b/.z.png", "b/.thumbs/1.png")
    for name in ("a/x.gif", "a/y.GIF", "b/deep/z.jfif", "b/IMG_1", "labels.csv", *hidden):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    os.mkfifo(root / "a" / "pipe.png")
    os.mkfifo(root / "pipe.png")
    (root / "b" / "deep" / "020.png").write_text("no image")
    line = load(root, skip_unreadable=True).notes[0]
    counts, _, left_out = line.partition("; left out: ")
    assert re.search(r"/set: 1\d images to train on, \d to test on; 2 classes: a 10, b 9$", counts)
    assert sorted(left_out.split(", ")) == [
        *("1 .csv", "1 .jfif", "1 file without extension", "1 hidden file", "1 hidden folder"),
        *("1 unreadable image", "2 .gif", "2 special files"),
    ]


def test_a_class_without_readable_images_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number, label in enumerate("abc"):
        write_images(root / label, range(50 * number, 50 * number + 10))
    for path in (root / "b").iterdir():
        path.write_text("no image")
    data = load(root, skip_unreadable=True)
    assert data.classes == ("a", "c")
    for images in (data.train, data.test):
        assert [grey // 100 for grey in images.pixels[:, 0, 0, 0].tolist()] == images.labels.tolist()
    assert "left out: 10 unreadable images, class b, of which no image can be read" in data.notes[0]
    for path in [*(root / "a").iterdir(), *(root / "c").iterdir()]:
        path.write_text("no image")
    with pytest.raises(BadInput, match="no image to train on or no image to test on in"):
        load(root, skip_unreadable=True)


def test_of_many_broken_files_three_are_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(2000):
        (tmp_path / "set" / f"{number:04d}.png").write_text("no image")
    with pytest.raises(BadInput) as refusal:
        load(tmp_path / "set")
    assert "2,000 of 2,000 files cannot be read as images" in str(refusal.value)
    assert "and 1,997 more" in str(refusal.value)
    assert len(str(refusal.value)) < 1000 + 4 * len(str(tmp_path))


def test_of_many_classes_the_first_are_named(tmp_path: Path) -> None:
    for number in range(30):
        write_images(tmp_path / "set" / f"n{number:02d}", range(2 + number % 3))
    line = load(tmp_path / "set").notes[0]
    assert "30 classes: n00 2, n01 3, n02 4, " in line
    assert "n07 3, and 22 more of 2 to 4" in line


# ---- names that are not UTF-8, and by command


def prepare(command: Command, root: str, *arguments: str) -> int:
    data = ["data=image_folder", f"data.root={root}", "data.image_size=8", "data.channels=1"]
    rest = ["rounds=0", "clients=2", "logger=none", "evaluation.grid=0", "evaluation.samples=0"]
    return command(*data, *rest, *arguments)


def result(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("runs/default/*/result.json")
    return json.loads(path.read_text())


def test_a_set_with_names_in_latin_1_runs_and_names_them_legibly(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = os.fsencode(tmp_path / "set")
    write_images(tmp_path / "set" / "dog", range(10))
    write_images(tmp_path / "set" / "cat", range(200, 210))
    os.rename(root + b"/cat/200.png", root + b"/cat/caf\xe9.png")
    os.rename(root + b"/cat", root + b"/Stra\xdfe")
    assert prepare(command, str(tmp_path / "set")) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(r"2 classes: Stra\xdfe 10, dog 10; left out: nothing")
    (table,) = tmp_path.glob("runs/default/*/partition.csv")
    assert {row.split(",")[1] for row in table.read_text().splitlines()[1:]} == {r"Stra\xdfe", "dog"}
    with open(root + b"/Stra\xdfe/caf\xe9.png", "wb") as file:
        file.write(b"no image")
    assert prepare(command, str(tmp_path / "set")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert r"set/Stra\xdfe/caf\xe9.png (no image of JPEG" in line


def test_a_root_in_latin_1_is_refused_with_what_to_do_and_a_link_to_it_runs(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "set" / "a", range(10))
    root = os.fsencode(tmp_path) + b"/caf\xe9"
    os.rename(tmp_path / "set", root)
    assert prepare(command, os.fsdecode(root)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert rf"data.root={tmp_path}/caf\xe9 is not UTF-8" in line
    assert not (tmp_path / "runs").exists()
    os.symlink(root, tmp_path / "set")
    assert prepare(command, str(tmp_path / "set")) == 0


def test_a_cell_prints_what_was_read_and_warns_of_twelve_bits(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "xray" / label).mkdir(parents=True)
        for number in range(10):
            values = rng.integers(0, 4096, (8, 8)).astype(np.uint16)
            values[0, :2] = 0, 4095
            Image.fromarray(values).save(tmp_path / "xray" / label / f"{number}.png")
    assert prepare(command, str(tmp_path / "xray")) == 0
    summary, warning = capfd.readouterr().err.splitlines()
    assert summary.startswith(f"fedlight: data.root {tmp_path}/xray: 16 images to train on, 4 to test on; ")
    assert "values 0 to 4095 only, and 0 to 65535 were taken" in warning
    assert "set 'data.range=[0,4095]' or data.range=measured" in warning
    assert prepare(command, str(tmp_path / "xray"), "data.range=[0,4095]") == 0
    assert len(list(tmp_path.glob("runs/default/*/result.json"))) == 2


@pytest.mark.parametrize("given", ["full", "[0]", "[4095,0]", "[0,0]", "[0,a]", "7", "[0,1,2]", "null"])
def test_a_range_is_type_measured_or_two_numbers(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], given: str
) -> None:
    write_images(tmp_path / "set" / "a", range(10))
    assert prepare(command, str(tmp_path / "set"), f"data.range={given}") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "data.range: must be type, measured, or two numbers such as [0,4095]" in line


def test_the_default_range_is_in_no_dump() -> None:
    given = {"name": "set", "image_size": 8, "channels": 1, "batch_size": 1, "limit": None, "source": {}}
    assert "range" not in DataConfig(**given, range="type").model_dump()
    assert DataConfig(**given, range=[0, 4095]).model_dump()["range"] == [0.0, 4095.0]


# ---- a cell that fails after it was checked


def test_a_cell_that_dies_before_its_first_round_is_failed_and_says_why(
    command: Command, tmp_path: Path
) -> None:
    root = write_images(tmp_path / "set" / "a", range(10)).parent
    assert prepare(command, str(root)) == 0
    (folder,) = tmp_path.glob("runs/default/*")
    for path in ("result.json", "partition.png"):
        (folder / path).unlink()
    (folder / "partition.png").mkdir()  # in the way
    assert prepare(command, str(root)) == 1
    assert result(tmp_path)["status"] == "failed"
    assert "partition.png" in result(tmp_path)["error"]
