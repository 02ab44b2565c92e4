"""A pretrained pipeline of diffusers: its parts, loaded from safetensors and JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, ModelMixin

from fedlight.diffusion.unet import ConvNextUNet
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.finetuning.pretrained_files import INDEX, find_pretrained, has_weights, hash_pretrained
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import LENGTH, plain_line
from fedlight.runtime.untrusted import parse_json

MODELS: Mapping[str, tuple[str, ...]] = {
    "unet": (ConvNextUNet.__name__, "UNet2DModel", "UNet2DConditionModel"),
    "vae": ("AutoencoderKL",),
    "vqvae": ("VQModel", "AutoencoderKL"),
}
"""The classes that a component may have, fedlight's or of diffusers; code beside the weights is never run."""
LARGEST_JSON = 2**16  # bytes of a file
JSON_LIMITS = (8, 2**8, 2**13)  # depth, lists and objects, values


@dataclass(frozen=True)
class PretrainedPipeline:
    """A pretrained pipeline, opened; its parts are loaded one by one.

    Attributes:
        folder: of the pipeline.
        sha256: of its files.
        classes: component, such as `unet` or `vae`: the name of its class.
    """

    folder: Path
    sha256: str
    classes: Mapping[str, str]

    @property
    def has_text(self) -> bool:
        """Whether the UNet is conditioned on text."""
        return self.classes.get("unet") == "UNet2DConditionModel"

    def load_model(self, component: str) -> ModelMixin:
        """A component of MODELS with its weights, float32, on the CPU, in evaluation mode.

        Raises:
            BadInput: the pipeline lacks it, it is of a class that is not permitted, or its weights do not
                fit or are not safetensors.
        """
        name = self.class_of(component)
        if name not in MODELS[component]:
            allowed = ", ".join(MODELS[component])
            raise BadInput(f"finetuning.pretrained: {component} of {self.folder} is {name}; can be {allowed}")
        kind: Any = ConvNextUNet if name == ConvNextUNet.__name__ else getattr(diffusers, name)
        place = self.folder / component
        if not (place / "config.json").is_file():
            raise BadInput(f"finetuning.pretrained: {self.folder} has no {component}/config.json")
        if not any(has_weights(path) for path in place.iterdir()):
            raise BadInput(
                f"finetuning.pretrained: {place} has no weights in safetensors, and others are not read; "
                "save_pretrained of diffusers writes them"
            )
        try:
            model, loaded = kind.from_pretrained(
                place,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # whose errors depend on whether accelerate is installed
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # each library below has errors of its own
            reason = plain_line(error, LENGTH)
            raise BadInput(
                f"finetuning.pretrained: {place} cannot be loaded as {name} from safetensors: {reason}"
            ) from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := list(loaded[problem]):
                raise BadInput(
                    f"finetuning.pretrained: the weights in {place} do not fit {name}: "
                    f"{problem.replace('_', ' ')} {names[0]}"
                )
        pretrained: ModelMixin = model
        return pretrained.eval()

    def load_schedule(self) -> DDPMScheduler:
        """The noise schedule that the model was trained with, whatever sampler the pipeline has."""
        self.class_of("scheduler")
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = _read_json(path)
        known = DDPMScheduler().config.keys()
        arguments = {key: value for key, value in config.items() if key in known and key[:1] != "_"}
        try:
            return DDPMScheduler(**arguments)
        except Exception as error:  # each value of the file reaches diffusers
            reason = plain_line(error, LENGTH)
            raise BadInput(f"finetuning.pretrained: {path} is no noise schedule: {reason}") from error

    def class_of(self, component: str) -> str:
        """The name of a component's class.

        Raises:
            BadInput: the pipeline has no such component.
        """
        if component not in self.classes:
            present = ", ".join(self.classes) or "nothing"
            raise BadInput(f"finetuning.pretrained: {self.folder} has no {component}; it has {present}")
        return self.classes[component]


def open_pretrained(config: FinetuningConfig, cache: str) -> PretrainedPipeline:
    """Opens the pretrained pipeline of the section `finetuning`, and checks its hash.

    Args:
        config: the section.
        cache: fedlight's cache folder, where hashes of unchanged files are kept.

    Raises:
        BadInput: there is no such pipeline, or its files are not those that the configuration names.
    """
    folder = find_pretrained(config.pretrained)
    sha256 = hash_pretrained(folder, cache)
    if config.sha256 is not None and sha256 != config.sha256:
        raise BadInput(
            f"finetuning.pretrained: {folder} has the SHA-256 {sha256}, and the configuration names "
            f"{config.sha256}: all participants need the same files"
        )
    index = _read_json(folder / INDEX)
    classes = {
        name: str(entry[-1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[-1] and name[:1] != "_"
    }
    return PretrainedPipeline(folder, sha256, classes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("it is too large")
        content = parse_json(path.read_text(encoding="utf-8"), *JSON_LIMITS)
        if not isinstance(content, dict):
            raise TypeError("it is no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"finetuning.pretrained: {path} cannot be read: {reason}") from error
    return content
