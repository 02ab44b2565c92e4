"""The files of a pretrained pipeline: where they are, and their hash; nothing heavy is imported."""

import hashlib
import re
from functools import cache as remembered
from pathlib import Path

from fedlight.data.file_hashes import UNREADABLE, file_hashes
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import plain_line

INDEX = "model_index.json"
COMPONENTS = ("unet", "scheduler", "vae", "vqvae", "text_encoder", "tokenizer")
"""The folders of a pipeline that are read."""
SUFFIXES = (".json", ".safetensors", ".txt")
VARIANT = re.compile(r"\.(fp16|bf16|ema|non_ema)[.-]")  # of weights that are not loaded
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_TIMEOUT = 10.0  # seconds for the Hub to answer
MISSING = "finetuning.pretrained must be set: the folder of a pipeline of diffusers, or its id on the Hub"


@remembered
def find_pretrained(pretrained: str | None) -> Path:
    """The folder of a pretrained pipeline; one of the Hugging Face Hub is downloaded to the Hub's cache.

    Args:
        pretrained: `finetuning.pretrained`, a folder or an id of the Hub such as `google/ddpm-cat-256`.

    Raises:
        BadInput: there is no such pipeline, or the Hub does not answer and its cache has no copy.
    """
    if not pretrained:
        raise BadInput(MISSING)
    folder = Path(pretrained)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(pretrained):
            raise BadInput(f"finetuning.pretrained: there is no folder {pretrained}")
        folder = _download(pretrained)
    if not (folder / INDEX).is_file():
        raise BadInput(
            f"finetuning.pretrained: {folder} is no pipeline of diffusers: it has no {INDEX}; fedlight "
            "export CELL --out FOLDER writes one"
        )
    return folder.absolute()


def _download(hub_id: str) -> Path:
    """The newest snapshot of a pipeline of the Hub; without internet the one in the Hub's cache."""
    from huggingface_hub import snapshot_download

    patterns = [INDEX, *(f"{name}/*{suffix}" for name in COMPONENTS for suffix in SUFFIXES)]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT))
    except Exception as error:  # each library below has errors of its own
        reason = plain_line(error, 200) or type(error).__name__
        raise BadInput(
            f"finetuning.pretrained={hub_id} is no folder here and cannot be fetched from the Hugging Face "
            f"Hub ({reason}); without internet give the folder of a pipeline"
        ) from error


def list_pretrained_files(folder: Path) -> list[Path]:
    """The files of a pipeline that are read, in order: configurations, weights, vocabularies."""
    files = [folder / INDEX]
    for component in COMPONENTS:
        files += sorted(
            path
            for path in (folder / component).glob("*")
            if path.suffix in SUFFIXES and not VARIANT.search(path.name)
        )
    return files


def has_weights(path: Path) -> bool:
    """Whether a file of a component holds weights that are loaded."""
    return path.suffix == ".safetensors" and not VARIANT.search(path.name)


def hash_pretrained(folder: Path, cache: str) -> str:
    """SHA-256 of the names and contents of the files of a pipeline that are read.

    Args:
        folder: of the pipeline.
        cache: fedlight's cache folder, where hashes of unchanged files are kept.

    Raises:
        BadInput: a file cannot be read.
    """
    files = list_pretrained_files(folder)
    digest = hashlib.sha256()
    for path, content in zip(files, file_hashes(folder, files, cache), strict=True):
        if content == UNREADABLE:
            raise BadInput(f"finetuning.pretrained: {path} cannot be read")
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content.sha256}\n".encode())
    return digest.hexdigest()


def pretrained_sha256(pretrained: str | None, cache: str) -> str | None:
    """The hash of a pretrained pipeline; None where it is missing, which the loader reports."""
    try:
        return hash_pretrained(find_pretrained(pretrained), cache)
    except BadInput:
        return None
