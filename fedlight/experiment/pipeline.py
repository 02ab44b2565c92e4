"""Export of a trained model as a diffusers pipeline, to be loaded by `from_pretrained`."""

import json
import re
import sys
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DiffusionPipeline

from fedlight.config import CellConfig
from fedlight.diffusion import depthwise, labelled_pipeline, unet
from fedlight.diffusion.ddpm import DDPM
from fedlight.finetuning.adapters import merge_adapters
from fedlight.finetuning.latent_pipeline import complete_pipeline
from fedlight.finetuning.latents import LatentSpace
from fedlight.finetuning.pretrained import open_pretrained
from fedlight.runtime import errors

UNET_CODE = (unet, depthwise, errors)  # the modules that the ConvNeXt UNet needs
CARD = """\
# A class-conditional diffusion model

The labels are 0 to {last}. Run this in the folder; `trust_remote_code=True` lets diffusers run its code:

```python
{imports}from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)
images = pipeline(class_labels=[0, {last}], guidance_scale=3.0).images
```
"""


def make_pipeline(module: DDPM, config: CellConfig, latents: LatentSpace | None) -> DiffusionPipeline:
    """The model's denoiser and its noise schedule as a pipeline: with class labels if it is conditional.

    Adapters are merged into the weights. A model of latents gets the other parts of its pretrained pipeline.

    Args:
        module: the model.
        config: of the cell.
        latents: where the model denoises; None for images.
    """
    denoiser = merge_adapters(module.denoiser).to(memory_format=torch.contiguous_format)
    if latents and config.finetuning:
        pretrained = open_pretrained(config.finetuning, config.evaluation.cache)
        return complete_pipeline(pretrained, denoiser, module.schedule, latents)
    conditional = module.label_dropout is not None
    kind = labelled_pipeline.LabelledDDPMPipeline if conditional else DDPMPipeline
    return kind(denoiser, module.schedule)


def save_pipeline(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Saves a pipeline, one with class labels as a plain `DDPMPipeline`; `add_code` adds what labels need."""
    if isinstance(pipeline, labelled_pipeline.LabelledDDPMPipeline):
        pipeline = DDPMPipeline(pipeline.unet, pipeline.scheduler)
    pipeline.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):  # written for the user alone; the others follow the umask
        path.chmod((folder / "model_index.json").stat().st_mode)


def add_code(folder: Path) -> str:
    """Puts the code that a pipeline needs beside its weights: fedlight's UNet, a pipeline with class labels.

    Args:
        folder: of a pipeline that `save_pipeline` wrote.

    Returns:
        The line of Python that loads the pipeline.
    """
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    library, _ = content["unet"]
    needs_unet_code, classes = library == unet.__name__, _count_classes(folder)
    if needs_unet_code:
        for module in UNET_CODE:
            source = Path(str(sys.modules[module.__name__].__file__)).read_text(encoding="utf-8")
            name = module.__name__.rpartition(".")[2]
            (folder / "unet" / f"{name}.py").write_text(
                re.sub(r"from fedlight\.\w+\.", "from .", source), encoding="utf-8"
            )
        content["unet"][0] = unet.__name__.rpartition(".")[2]
    if classes:
        pipeline = Path(str(labelled_pipeline.__file__)).read_text(encoding="utf-8")
        (folder / "pipeline.py").write_text(pipeline, encoding="utf-8")
        content["_class_name"] = ["pipeline", labelled_pipeline.LabelledDDPMPipeline.__name__]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    name = "DiffusionPipeline" if classes else content["_class_name"]
    trust = ", trust_remote_code=True" if needs_unet_code or classes else ""
    users_unet = not needs_unet_code and library.partition(".")[0] != "diffusers"
    imports = [f"import {library}"] if users_unet else []
    load = "; ".join([*imports, f'{name}.from_pretrained("{folder}"{trust})'])
    if not classes:
        return f"{load}    # from diffusers import {name}"
    card = CARD.format(imports="".join(f"{line}\n" for line in imports), last=classes - 1)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return f"{load}(class_labels=[...])    # from diffusers import {name}; labels are 0 to {classes - 1}"


def _count_classes(folder: Path) -> int:
    """The number of classes of a conditional model; 0 for an unconditional one."""
    embeddings = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")).get(
        "num_class_embeds"
    )
    return embeddings - 1 if embeddings else 0
