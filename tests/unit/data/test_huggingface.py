"""Local data sets in the formats of Hugging Face, and clients by a column of them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedlight.data.data_name import data_name, hub_revision
from fedlight.data.dataset import Dataset
from fedlight.data.huggingface import load
from fedlight.data.partition import natural
from fedlight.runtime.errors import BadInput

ROWS = 30
SITES = ["north", "east", "south"]


def png(pixels: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def pictures(rows: int = ROWS) -> NDArray[np.uint8]:
    """Images whose corner tells their row."""
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 8, 8), np.uint8)
    pixels[:, 0, 0] = range(rows)
    return pixels


def table(rows: int = ROWS, **columns: Any) -> datasets.Dataset:
    content = {"image": [{"bytes": png(pixels), "path": None} for pixels in pictures(rows)]}
    content |= {"label": [row % 2 for row in range(rows)], "site": [SITES[row % 3] for row in range(rows)]}
    made = datasets.Dataset.from_dict(content | columns)
    return made.cast_column("image", datasets.Image())


def as_parquet(folder: Path) -> None:
    table().to_parquet(folder / "train-00000-of-00001.parquet")


def as_arrow(folder: Path) -> None:
    table().save_to_disk(folder)


def as_images(folder: Path) -> None:
    lines = []
    for row, pixels in enumerate(pictures()):
        (folder / f"{row:02d}.png").write_bytes(png(pixels))
        lines.append({"file_name": f"{row:02d}.png", "label": row % 2, "site": SITES[row % 3]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def open_set(folder: Path, cache: Path, **options: Any) -> Dataset:
    return load(str(cache), 8, 1, str(folder), client_column="site", **options)


@pytest.mark.parametrize("write", [as_parquet, as_arrow, as_images])
def test_a_local_set_holds_its_images_labels_and_sites(write: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder)
    for _ in range(2):  # decoded, and from the cache
        dataset = open_set(folder, tmp_path / "cache")
        assert (len(dataset.train), len(dataset.test), dataset.classes) == (24, 6, ("0", "1"))
        rows = [dataset.train.pixels[:, 0, 0, 0].numpy(), dataset.test.pixels[:, 0, 0, 0].numpy()]
        assert sorted(np.concatenate(rows)) == list(range(ROWS))
        for part, row in zip((dataset.train, dataset.test), rows, strict=True):
            assert (part.pixels[:, 0].numpy() == pictures()[row]).all()
            assert (part.labels == row % 2).all()
        assert dataset.train.groups is not None
        assert [sorted(SITES)[group] for group in dataset.train.groups] == [SITES[row % 3] for row in rows[0]]
    assert dataset.notes == (
        f"data.path {folder}: 24 images to train on, 6 to test on; 2 classes; site has 3 values",
    )
    assert len(list((tmp_path / "cache" / "decoded").glob("*.npy"))) == 1


def test_a_split_named_test_is_the_test_set_and_names_of_classes_are_kept(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["benign", "malignant", "unsure"])
    splits = {"train": table(20), "test": table(6), "validation": table(4)}
    splits = {name: rows.cast_column("label", names) for name, rows in splits.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    dataset = open_set(tmp_path / "set", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (20, 6)
    assert dataset.classes == ("benign", "malignant", "unsure")
    assert list(dataset.test.pixels[:, 0, 0, 0]) == list(range(6))
    assert len(open_set(tmp_path / "set", tmp_path, split="validation").train) == 4
    assert open_set(tmp_path / "set", tmp_path, label_column=None).classes == ("all",)


def test_the_name_is_the_folder_s_content_or_the_commit_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / place / "set" for place in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir(parents=True)
        as_images(folder)
    (folders[2] / "metadata.jsonl").write_text(
        (folders[2] / "metadata.jsonl").read_text().replace("north", "west")
    )
    first, same, other = (
        data_name("huggingface", str(folder), str(tmp_path / "cache")) for folder in folders
    )
    assert first == same != other
    assert first.startswith("set_")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert data_name("huggingface", "someone/unknown", str(tmp_path)) == "someone_unknown"
    reference = tmp_path / "hub" / "datasets--someone--digits" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("0123456789abcdef")
    assert hub_revision("someone/digits") == "0123456789abcdef"
    assert data_name("huggingface", "someone/digits", str(tmp_path)) == "someone_digits_01234567"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"path": None}, "data=huggingface needs a data set: set data.path=FOLDER"),
    "no such set": ({"path": "nobody/nothing"}, "data.path=nobody/nothing: .*without internet, only those"),
    "split": ({"split": "dev"}, "data.split=dev is no split of .*; there are train"),
    "image column": ({"image_column": "img"}, "data.image_column=img is no column .* image, label, site"),
    "label column": ({"label_column": "y"}, "data.label_column=y is no column"),
    "client column": ({"client_column": "ward"}, "data.client_column=ward is no column"),
    "no images in it": ({"image_column": "site"}, "data.image_column=site of .* holds Value.* and no images"),
    "labels of a kind": (
        {"label_column": "score"},
        "column score must hold whole numbers or text, got float",
    ),
    "missing sites": ({"client_column": "owner"}, "column owner must hold .*, got NoneType, str"),
    "folder without images": ({"path": str(Path(__file__).parent)}, "data.path=.*: .*Error: "),
    "channels": ({"channels": 2}, "data.channels must be 1"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    score, owner = [row / 7 for row in range(ROWS)], ["a", None, "b"] * (ROWS // 3)
    table(score=score, owner=owner).save_to_disk(tmp_path / "set")
    given = {"cache": str(tmp_path), "image_size": 8, "channels": 1, "path": str(tmp_path / "set"), **options}
    with pytest.raises(BadInput, match=message) as raised:
        load(**given)
    assert "\n" not in str(raised.value)


def test_an_image_that_cannot_be_read_is_named_by_its_row(tmp_path: Path) -> None:
    content = {"image": [png(pixels) for pixels in pictures(4)], "label": [0, 0, 1, 1]}
    content["image"][2] = b"no image"
    datasets.Dataset.from_dict(content).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(BadInput, match="the image of row 2 cannot be read: no image of JPEG, PNG"):
        load(str(tmp_path / "cache"), 8, 1, str(tmp_path))
    assert not list((tmp_path / "cache" / "decoded").glob("*.npy"))


def test_a_table_from_elsewhere_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    private = tmp_path / "private.png"
    private.write_bytes(png(pictures(1)[0]))
    (tmp_path / "set").mkdir()
    rows = {"image": [{"bytes": None, "path": str(private)}] * 4, "label": [0, 0, 1, 1]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "set" / "a.parquet"
    )
    with pytest.raises(BadInput, match="lies outside of the folder"):
        load(str(tmp_path / "cache"), 8, 1, str(tmp_path / "set"))


def test_natural_clients_are_groups() -> None:
    groups = np.array([4, 0, 4, 2, 0, 4, 4, 2, 7])
    labels = np.zeros(9, np.int64)
    parts = natural(labels, 4, 0, groups)
    assert [list(part) for part in parts] == [[1, 4], [3, 7], [0, 2, 5, 6], [8]], "in the order of the groups"

    parts = natural(labels, 2, 0, groups)  # of sizes 4, 2, 2, 1: 4 | 2, 2 | then the first again
    assert [sorted(set(groups[part].tolist())) for part in parts] == [[4, 7], [0, 2]]
    assert sorted(np.concatenate(parts)) == list(range(9))
    with pytest.raises(BadInput, match="of 4 groups, so clients must be at most 4, got 5"):
        natural(labels, 5, 0, groups)
    with pytest.raises(BadInput, match="data=huggingface with"):
        natural(labels, 2, 0, None)
