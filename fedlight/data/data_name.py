"""What data are called in a cell's id: by what they hold, so that other images are another cell."""

from functools import cache as remembered
from pathlib import Path

from fedlight.data.file_hashes import file_hashes, folder_digest
from fedlight.data.layout import is_split
from fedlight.data.walk import walk
from fedlight.runtime.printable import legible

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
KNOWN = {
    "fmnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "cifar10": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    "celeba": {
        "list_attr_celeba.txt": "75e246fa4810816ffd6ee81facbd244c",
        "list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668",
    },
}
"""MD5 of the published files, unzipped; of CelebA's images none is known."""


@remembered
def data_name(kind: str, root: str | None, cache: str) -> str:
    """The name of a data set: of a known one its own, else with a hash of the contents of its files.

    Args:
        kind: fmnist, cifar10, celeba, or image_folder, of which each is its folder's name and a hash.
        root: `data.root`.
        cache: where hashes of files are kept for as long as the files do not change.

    Returns:
        The plain `kind` where the files are the published ones, or some are not there.
    """
    folder = _folder(kind, root, cache)
    if folder is None or not folder.is_dir():
        return kind
    if kind not in KNOWN:
        return f"{legible(folder.name)}_{_files_digest(folder, cache)}"
    files = [_file(folder, name) for name in KNOWN[kind]]
    if not all(path.is_file() for path in files):
        return kind
    if [content.md5 for content in file_hashes(folder, files, cache)] == list(KNOWN[kind].values()):
        return kind
    files = walk(folder).files if kind == "celeba" else files
    return f"{kind}_{folder_digest(folder, files, cache)}"


def _folder(kind: str, root: str | None, cache: str) -> Path | None:
    """Where the files of a data set are."""
    if kind == "fmnist":
        place = DEBIAN if DEBIAN.is_dir() else Path(cache, "FashionMNIST", "raw")
        return place if root is None else Path(root).absolute()
    if kind in KNOWN:
        inner = {"cifar10": "cifar-10-batches-py", "celeba": "celeba"}[kind]
        return Path(cache if root is None else root, inner).absolute()
    return None if root is None else Path(root).absolute()


def _file(folder: Path, name: str) -> Path:
    zipped = folder / f"{name}.gz"
    return zipped if zipped.is_file() else folder / name


def _files_digest(folder: Path, cache: str) -> str:
    """The hash of all visible files of a folder; a split into train and test counts, as it decides roles."""
    return folder_digest(folder, walk(folder).files, cache, "split" if is_split(folder) else "")
