"""What a fine-tuned cell starts from: the pretrained UNet, prepared for what is trained of it."""

from fedlight.diffusion.model import Backbone
from fedlight.finetuning.adapters import add_adapters
from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.finetuning.pretrained import open_pretrained
from fedlight.runtime.seeds import derive_seed

LORA = "lora"


def make_start(config: FinetuningConfig, seed: int, cache: str) -> Backbone:
    """The pretrained UNet and its schedule; with `finetuning=lora` the UNet has adapters, which are trained.

    Args:
        config: the section `finetuning`.
        seed: of the cell, which decides the first values of adapters.
        cache: fedlight's cache folder.

    Raises:
        BadInput: the pipeline cannot be loaded, or a target of the adapters is unknown.
    """
    pipeline = open_pretrained(config, cache)
    unet, schedule = pipeline.load_model("unet"), pipeline.load_schedule()
    unet.requires_grad_(True)
    frozen: frozenset[str] = frozenset()
    if config.name == LORA:
        frozen = add_adapters(unet, config, derive_seed(seed, "adapters"))
    return Backbone(unet, schedule, frozen)
