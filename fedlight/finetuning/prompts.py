"""Prompts made of class names, and their embeddings by the frozen text encoder of a pretrained pipeline."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedlight.diffusion.sampling import PROMPTS
from fedlight.runtime.cache import load_or_make
from fedlight.runtime.errors import BadInput, format_error
from fedlight.runtime.printable import LENGTH, plain_line

DEFAULT_PROMPT = "a photo of a {label}"
LABEL = "{label}"
EMBEDDINGS = "embeddings"
VOCABULARIES = ("tokenizer.json", "vocab.json")  # files of a tokenizer, either of which it needs
INSTALL = "a text-conditioned model needs transformers: pip install 'fedlight[finetuning]'"


def condition_on_prompts(unet: nn.Module, embeddings: Tensor) -> None:
    """Lets a text-conditioned UNet be called with class labels, each of which stands for a prompt.

    `unet(x_t, t, class_labels=labels)` is `unet(x_t, t, encoder_hidden_states=embeddings[labels])`.

    Args:
        unet: a `UNet2DConditionModel`; its state_dict does not change.
        embeddings: of the prompt of each class and, last, of the empty prompt, which means no label; float32,
            shape (classes + 1, tokens, width).
    """
    unet.register_buffer(PROMPTS, embeddings, persistent=False)
    unet.register_forward_pre_hook(_replace_labels, with_kwargs=True)


def _replace_labels(
    unet: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before `forward`: labels become embeddings; a call without labels is unchanged."""
    if "class_labels" not in keywords:
        return arguments, keywords
    others = {name: value for name, value in keywords.items() if name != "class_labels"}
    embeddings = getattr(unet, PROMPTS)[keywords["class_labels"]]
    return arguments, {**others, "encoder_hidden_states": embeddings}


def make_prompts(template: str | None, classes: Sequence[str]) -> list[str]:
    """The prompt of each class, and last the empty prompt.

    Args:
        template: `finetuning.prompt`, with `{label}` for the class name; None for DEFAULT_PROMPT.
        classes: the class names.
    """
    template = DEFAULT_PROMPT if template is None else template
    return [*(template.replace(LABEL, name) for name in classes), ""]


def embed_cached(folder: Path, sha256: str, prompts: Sequence[str], cache: str) -> Tensor:
    """The embeddings of prompts by the text encoder of a pipeline, computed once and kept in the cache.

    Args:
        folder: of the pipeline.
        sha256: of its files.
        prompts: of the classes.
        cache: fedlight's cache folder.

    Returns:
        Float32, shape (prompts, tokens, width).

    Raises:
        BadInput: the text encoder or the tokenizer cannot be loaded, a prompt has too many tokens, or the
            cache cannot be used.
    """
    key = repr((sha256, tuple(prompts), torch.get_num_threads()))
    path = (
        Path(cache).expanduser() / "prompts" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    )

    def make(path: Path) -> None:
        save_file({EMBEDDINGS: embed(prompts, *load_text_encoder(folder))}, path)

    return load_or_make(path, lambda path: load_file(path)[EMBEDDINGS], make)


@torch.no_grad()
def embed(prompts: Sequence[str], tokenizer: Any, encoder: Any) -> Tensor:
    """The embeddings of prompts, as `StableDiffusionPipeline` computes them.

    Args:
        prompts: texts.
        tokenizer: a CLIPTokenizer; it pads each of them to its `model_max_length`.
        encoder: a CLIPTextModel.

    Returns:
        Float32, shape (prompts, tokens, width).

    Raises:
        BadInput: a prompt has more tokens than the encoder takes.
    """
    length = tokenizer.model_max_length
    for prompt in prompts:
        if (tokens := len(tokenizer(prompt, verbose=False).input_ids)) > length:
            raise BadInput(
                f"finetuning.prompt: {prompt!r} has {tokens} tokens, and the text encoder takes {length}; "
                "choose a shorter prompt or shorter class names (data.classes)"
            )
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt").input_ids
    return encoder.eval()(ids)[0].float().contiguous()


def load_text_encoder(folder: Path) -> tuple[Any, Any]:
    """The CLIPTokenizer and the CLIPTextModel of a pipeline, from JSON, text and safetensors.

    Raises:
        BadInput: transformers is not installed, or a part is missing or damaged.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise BadInput(INSTALL) from error
    disable_progress_bar()  # which would be drawn for each file
    vocabulary = folder / "tokenizer"
    if vocabulary.is_dir() and not any((vocabulary / name).is_file() for name in VOCABULARIES):
        raise BadInput(
            f"finetuning.pretrained: {vocabulary} has no vocabulary ({' or '.join(VOCABULARIES)}): give the "
            "folder of a complete StableDiffusionPipeline"
        )
    tokenizer = _load(CLIPTokenizer.from_pretrained, folder / "tokenizer")
    return tokenizer, _load(CLIPTextModel.from_pretrained, folder / "text_encoder", use_safetensors=True)


def _load(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    if not folder.is_dir():
        raise BadInput(
            f"finetuning.pretrained: {folder.parent} conditions on text and has no {folder.name}: give the "
            "folder of a complete StableDiffusionPipeline"
        )
    try:
        return load(folder, local_files_only=True, **options)
    except Exception as error:  # each library below has errors of its own
        reason = plain_line(format_error(error), LENGTH)
        raise BadInput(f"finetuning.pretrained: {folder} cannot be loaded: {reason}") from error
