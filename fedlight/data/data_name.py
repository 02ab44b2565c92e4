"""The name of a data set in a cell's id, which depends on the contents of the set's files."""

import re
from functools import cache as remembered
from pathlib import Path

from fedlight.data.file_hashes import file_hashes, folder_digest
from fedlight.data.folder_files import list_files
from fedlight.data.folder_layout import is_split
from fedlight.runtime.printable import legible

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HUB = "huggingface"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
HUB_TIMEOUT = 10.0  # seconds for the Hub to answer
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
"""MD5 of the published files, unzipped; none is published for CelebA's images.

Torchvision has the same lists, but a cell must get its id without an import of torch.
"""


@remembered
def data_name(kind: str, root: str | None, cache: str) -> str:
    """The name of a data set.

    Args:
        kind: fmnist, cifar10, celeba, image_folder or huggingface.
        root: `data.root`; for huggingface `data.path`, a folder or an id of the Hub.
        cache: fedlight's cache folder, where hashes of unchanged files are kept.

    Returns:
        For a published set `kind` where its files are the published ones or some are missing, otherwise
        `kind` and a hash of the files; for image_folder the folder's name and a hash of its files; for an id
        of the Hub the id and the start of its commit.
    """
    folder = _folder(kind, root, cache)
    if kind == HUB and root is not None and HUB_ID.fullmatch(root) and not Path(root).is_dir():
        revision = hub_revision(root)
        return "_".join([root.replace("/", "_"), *([revision[:8]] if revision else [])])
    if folder is None or not folder.is_dir():
        return kind
    if kind not in KNOWN:
        return f"{legible(folder.name)}_{_files_digest(folder, cache)}"
    files = [_file(folder, name) for name in KNOWN[kind]]
    if not all(path.is_file() for path in files):
        return kind
    if [content.md5 for content in file_hashes(folder, files, cache)] == list(KNOWN[kind].values()):
        return kind
    files = list_files(folder).files if kind == "celeba" else files
    return f"{kind}_{folder_digest(folder, files, cache)}"


@remembered
def hub_revision(path: str) -> str | None:
    """The commit of a data set on the Hugging Face Hub: the newest, or without internet the one in the cache.

    Args:
        path: id of the data set, such as `ylecun/mnist`.

    Returns:
        The commit's hash; None where neither the Hub nor the cache knows the data set.
    """
    if not HUB_ID.fullmatch(path):
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    try:
        return HfApi().dataset_info(path, timeout=HUB_TIMEOUT).sha
    except Exception:  # each library below has errors of its own
        reference = Path(HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="dataset"), "refs", "main")
        return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def _folder(kind: str, root: str | None, cache: str) -> Path | None:
    """The folder of a data set's files; None for a folder of the user's without a root."""
    if kind == "fmnist":
        default = DEBIAN if DEBIAN.is_dir() else Path(cache, "FashionMNIST", "raw")
        return default if root is None else Path(root).absolute()
    if kind in KNOWN:
        sub_folder = {"cifar10": "cifar-10-batches-py", "celeba": "celeba"}[kind]
        return Path(cache if root is None else root, sub_folder).absolute()
    return None if root is None else Path(root).absolute()


def _file(folder: Path, name: str) -> Path:
    zipped = folder / f"{name}.gz"
    return zipped if zipped.is_file() else folder / name


def _files_digest(folder: Path, cache: str) -> str:
    """The hash of a folder's visible files and of its layout, which decides what is trained on."""
    return folder_digest(folder, list_files(folder).files, cache, "split" if is_split(folder) else "")
