"""Prompts made of class names, and their embeddings by the frozen text encoder of a pretrained pipeline."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fedlight.runtime.cache import load_or_make
from fedlight.runtime.errors import BadInput, format_error

DEFAULT_PROMPT = "a photo of a {label}"
LABEL = "{label}"
EMBEDDINGS = "embeddings"


class PromptedUNet(nn.Module):
    """A text-conditioned UNet that is called with class labels, as a class-conditional one.

    Args:
        unet: a `UNet2DConditionModel`.
        embeddings: of the prompt of each class and, last, of the empty prompt, which means no label; float32,
            shape (classes + 1, tokens, width). They belong to no state_dict.
    """

    embeddings: Tensor

    def __init__(self, unet: nn.Module, embeddings: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer(EMBEDDINGS, embeddings, persistent=False)
        self.config = SimpleNamespace(num_class_embeds=len(embeddings))

    def forward(self, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor) -> Any:
        """Predicts the noise or the velocity.

        Args:
            sample: noisy latents x_t, float, shape (n, channels, height, width).
            timestep: t, shape () or (n,).
            class_labels: int64 in 0..classes, shape (n,).
        """
        return self.unet(sample, timestep, encoder_hidden_states=self.embeddings[class_labels])


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
    path = Path(cache).expanduser() / "prompts" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def make(path: Path) -> None:
        tokenizer = _load(CLIPTokenizer.from_pretrained, folder / "tokenizer")
        encoder = _load(CLIPTextModel.from_pretrained, folder / "text_encoder", use_safetensors=True)
        save_file({EMBEDDINGS: embed(prompts, tokenizer, encoder)}, path)

    return load_or_make(path, lambda path: load_file(path)[EMBEDDINGS], make)


@torch.no_grad()
def embed(prompts: Sequence[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> Tensor:
    """The embeddings of prompts, as `StableDiffusionPipeline` computes them.

    Args:
        prompts: texts.
        tokenizer: pads each of them to its `model_max_length`.
        encoder: frozen.

    Returns:
        Float32, shape (prompts, tokens, width).

    Raises:
        BadInput: a prompt has more tokens than the encoder takes.
    """
    length = tokenizer.model_max_length
    for prompt in prompts:
        if (tokens := len(tokenizer(prompt).input_ids)) > length:
            raise BadInput(
                f"finetuning.prompt: {prompt!r} has {tokens} tokens, and the text encoder takes {length}; "
                "choose a shorter prompt or shorter class names (data.classes)"
            )
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt").input_ids
    return encoder.eval()(ids)[0].float().contiguous()


def _load(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    if not folder.is_dir():
        raise BadInput(
            f"finetuning.pretrained: {folder.parent} conditions on text and has no {folder.name}: give the "
            "folder of a complete StableDiffusionPipeline"
        )
    try:
        return load(folder, local_files_only=True, **options)
    except Exception as error:  # each library below has errors of its own
        reason = " ".join(format_error(error).split())[:300]
        raise BadInput(f"finetuning.pretrained: {folder} cannot be loaded: {reason}") from error
