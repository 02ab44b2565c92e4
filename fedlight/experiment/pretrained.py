"""A trained model in the layout of diffusers' `from_pretrained`."""

import json
import re
import sys
from pathlib import Path

import torch

from fedlight.diffusion import depthwise, unet
from fedlight.diffusion.ddpm import DDPM
from fedlight.runtime import errors

CODE = (unet, depthwise, errors)  # what the ConvNeXt UNet is made of


def save_pipeline(folder: Path, module: DDPM) -> None:
    """Saves the model's denoiser and its noise schedule as a `DDPMPipeline`."""
    from diffusers import DDPMPipeline  # brings all of diffusers' models, a second or two

    denoiser = module.denoiser.to(memory_format=torch.contiguous_format)
    DDPMPipeline(denoiser, module.schedule).save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):  # for the user alone, whatever the umask says
        path.chmod((folder / "model_index.json").stat().st_mode)


def add_code(folder: Path) -> str:
    """Puts the UNet's code beside its weights, where it is fedlight's; returns what loads the model."""
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    library, _ = content["unet"]
    load = f'DDPMPipeline.from_pretrained("{folder}"'
    if library != unet.__name__:
        own = library.partition(".")[0] != "diffusers"
        return f"{f'import {library}; ' if own else ''}{load})"
    for module in CODE:
        source = Path(str(sys.modules[module.__name__].__file__)).read_text(encoding="utf-8")
        name = module.__name__.rpartition(".")[2]
        (folder / "unet" / f"{name}.py").write_text(
            re.sub(r"from fedlight\.\w+\.", "from .", source), encoding="utf-8"
        )
    content["unet"][0] = unet.__name__.rpartition(".")[2]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return f"{load}, trust_remote_code=True)"
