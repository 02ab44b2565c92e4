"""What data are called in a cell's id: by what they hold, so that other images are another cell."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import cache as remembered
from pathlib import Path

from fedlight.runtime.files import atomic

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
        cache: where hashes of files are kept for as long as they do not change in size and time.

    Returns:
        The plain `kind` where the files are the published ones, or some are not there.
    """
    folder = _folder(kind, root, cache)
    if folder is None or not folder.is_dir():
        return kind
    if kind not in KNOWN:
        return f"{folder.name}_{_digest(folder, _visible(folder), cache)}"
    files = [_file(folder, name) for name in KNOWN[kind]]
    if not all(path.is_file() for path in files):
        return kind
    found = [md5 for _, md5 in _hashes(folder, files, cache)]
    if found == list(KNOWN[kind].values()):
        return kind
    return f"{kind}_{_digest(folder, _visible(folder) if kind == 'celeba' else files, cache)}"


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


def _visible(folder: Path) -> list[Path]:
    """The files of a folder, sorted; what is hidden does not count."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(p for p in found if not any(part[0] == "." for part in p.relative_to(folder).parts))


def _digest(folder: Path, files: list[Path], cache: str) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for path, (sha256, _) in zip(files, _hashes(folder, files, cache), strict=True):
        digest.update(f"{path.relative_to(folder)}\0{sha256}\n".encode())
    return digest.hexdigest()


def _hashes(folder: Path, files: Iterable[Path], cache: str) -> list[tuple[str, str]]:
    """SHA-256 and MD5 of each file's content; of a file that was hashed before, as they were noted then."""
    key = hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()
    notes = Path(cache) / "hashes" / f"{folder.name}-{key}.json"
    keep = True
    try:
        before = json.loads(notes.read_text(encoding="utf-8"))
    except PermissionError:  # another user's, which stays as it is
        before, keep = {}, False
    except (OSError, ValueError):
        before = {}
    known = dict(before)
    hashes = []
    for path in files:
        status, name = path.stat(), str(path.relative_to(folder))
        stamp = [status.st_size, status.st_mtime_ns]
        if known.get(name, [])[:2] != stamp:
            content = _content(path)
            md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
            known[name] = [*stamp, hashlib.sha256(content).hexdigest(), md5]
        hashes.append((known[name][2], known[name][3]))
    if keep and known != before:
        with suppress(OSError):  # a cache: without it, files are hashed again
            notes.parent.mkdir(parents=True, exist_ok=True)
            with atomic(notes) as temporary:
                temporary.write_text(json.dumps(known), encoding="utf-8")
    return hashes


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        with suppress(OSError, EOFError, zlib.error):  # broken: the loader tells
            return gzip.decompress(content)
    return content
