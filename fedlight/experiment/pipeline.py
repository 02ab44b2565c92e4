"""A trained model in the layout of diffusers' `from_pretrained`."""

import json
import re
import sys
from pathlib import Path

import torch

from fedlight.diffusion import depthwise, labelled_pipeline, unet
from fedlight.diffusion.ddpm import DDPM
from fedlight.runtime import errors

CODE = (unet, depthwise, errors)  # what the ConvNeXt UNet is made of
CARD = """\
# A class-conditional diffusion model

The labels are 0 to {last}. Run in this folder, whose code `trust_remote_code=True` lets diffusers run:

```python
{imports}from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)
images = pipeline(class_labels=[0, {last}], guidance_scale=3.0).images
```
"""


def save_pipeline(folder: Path, module: DDPM) -> None:
    """Saves the model's denoiser and its noise schedule as a `DDPMPipeline`."""
    from diffusers import DDPMPipeline  # brings all of diffusers' models, a second or two

    denoiser = module.denoiser.to(memory_format=torch.contiguous_format)
    DDPMPipeline(denoiser, module.schedule).save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):  # for the user alone, whatever the umask says
        path.chmod((folder / "model_index.json").stat().st_mode)


def add_code(folder: Path) -> str:
    """Puts the code that a model needs beside its weights; returns what loads it.

    The code is that of the UNet, where it is fedlight's, and for a conditional model a pipeline that takes
    class labels.
    """
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    library, _ = content["unet"]
    unets_code, labels = library == unet.__name__, _labels(folder)
    if unets_code:
        for module in CODE:
            source = Path(str(sys.modules[module.__name__].__file__)).read_text(encoding="utf-8")
            name = module.__name__.rpartition(".")[2]
            (folder / "unet" / f"{name}.py").write_text(
                re.sub(r"from fedlight\.\w+\.", "from .", source), encoding="utf-8"
            )
        content["unet"][0] = unet.__name__.rpartition(".")[2]
    if labels:
        pipeline = Path(str(labelled_pipeline.__file__)).read_text(encoding="utf-8")
        (folder / "pipeline.py").write_text(pipeline, encoding="utf-8")
        content["_class_name"] = ["pipeline", labelled_pipeline.LabelledDDPMPipeline.__name__]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    name = "DiffusionPipeline" if labels else "DDPMPipeline"
    trust = ", trust_remote_code=True" if unets_code or labels else ""
    own = [f"import {library}"] if not unets_code and library.partition(".")[0] != "diffusers" else []
    load = "; ".join([*own, f'{name}.from_pretrained("{folder}"{trust})'])
    if not labels:
        return f"{load}    # from diffusers import {name}"
    imports = "".join(f"{line}\n" for line in own)
    (folder / "README.md").write_text(CARD.format(imports=imports, last=labels - 1), encoding="utf-8")
    return f"{load}(class_labels=[...])    # from diffusers import {name}; labels are 0 to {labels - 1}"


def _labels(folder: Path) -> int:
    """The number of classes of a conditional model's labels; 0 of another."""
    embeds = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")).get("num_class_embeds")
    return embeds - 1 if embeds else 0
