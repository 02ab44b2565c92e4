"""Makes the client model that the sections `model` and `optimizer` of the configuration describe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, ModelMixin
from hydra.utils import instantiate
from lightning import seed_everything

from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.model_config import ModelConfig, OptimizerConfig
from fedlight.diffusion.sampling import PROMPTS
from fedlight.runtime.errors import BadInput, format_error
from fedlight.runtime.extension import make_extension
from fedlight.runtime.seeds import derive_seed


@dataclass(frozen=True)
class Backbone:
    """A UNet and its noise schedule.

    Attributes:
        unet: with its first weights.
        schedule: that it is trained with.
        frozen: state_dict names of the UNet that are not trained.
    """

    unet: ModelMixin
    schedule: DDPMScheduler
    frozen: frozenset[str] = frozenset()


def make_model(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    classes: int,
    seed: int,
    server_average: bool,
    pretrained: Backbone | None = None,
) -> DDPM:
    """The client model with its first weights, which the seed decides.

    Args:
        config: the section `model`.
        optimizer: the section `optimizer`.
        classes: of the data; a conditional model has an embedding for each, and one more for no label.
        seed: of the cell.
        server_average: the server keeps the moving average of the weights, over rounds; otherwise the model
            keeps one over steps, where `ema_decay` is set.

    Raises:
        BadInput: the model cannot be made of this configuration.
    """
    if config.exchange_ema and config.ema_decay is None:
        raise BadInput(
            "model.exchange_ema=true exchanges a moving average, and there is none: set model.ema_decay to a "
            "number between 0 and 1, or leave model.exchange_ema out"
        )
    backbone = pretrained or _make_backbone(config, classes, seed)
    embeds_labels = config.conditional and not hasattr(backbone.unet, PROMPTS)
    slices = _conditional_slices(config, classes) if embeds_labels else config.slices
    return DDPM(
        backbone.unet,
        backbone.schedule,
        loss=config.loss,
        optimizer=instantiate(
            optimizer.model_dump(by_alias=True, exclude={"warmup", "decay"}), _partial_=True
        ),
        slices=slices,
        ema_decay=None if server_average else config.ema_decay,
        exchange_ema=config.exchange_ema,
        snr_gamma=config.snr_gamma,
        label_dropout=config.label_dropout if config.conditional else None,
        frozen=backbone.frozen,
    )


def _make_backbone(config: ModelConfig, classes: int, seed: int) -> Backbone:
    """The UNet that the section `model` describes, with weights from the seed, and its schedule."""
    if config.unet is None or config.schedule is None:
        raise BadInput(
            f"model={config.name} has no UNet and no schedule of its own: it takes those of a pretrained "
            "pipeline, by finetuning=full or finetuning=lora"
        )
    seed_everything(derive_seed(seed, "model"), verbose=False)
    schedule = instantiate(config.schedule)
    embedding = {"num_class_embeds": classes + 1} if config.conditional else {}
    unet = make_extension("model.unet", config.unet, _convert_="all", **embedding)
    if not isinstance(unet, ModelMixin):
        raise BadInput(f"model.unet must be a diffusers model (ModelMixin), got {type(unet).__name__}")
    return Backbone(unet, schedule)


def _conditional_slices(config: ModelConfig, classes: int) -> Mapping[str, Sequence[str]]:
    """The slices of a conditional model: one of them contains the label embedding."""
    if classes < 2:
        raise BadInput("model.conditional=true needs labels, and all images of the data set are of one class")
    chosen = config.label_slice or next(iter(config.slices))
    if chosen not in config.slices:
        raise BadInput(f"model.label_slice must be one of {', '.join(config.slices)}, got {chosen}")
    return {**config.slices, chosen: [*config.slices[chosen], "class_embedding"]}


def check_unet(model: DDPM, config: ModelConfig, shape: tuple[int, int, int]) -> None:
    """Calls the UNet once, on one image.

    Args:
        model: the client model.
        config: the section `model`.
        shape: channels, height and width of an image.

    Raises:
        BadInput: the prediction does not have the shape and the dtype of the image.
    """
    x_t = torch.zeros(1, *shape)
    labels: dict[str, Any] = {"class_labels": torch.zeros(1, dtype=torch.int64)} if config.conditional else {}
    backbone = f"model.unet {config.unet.get('_target_')}" if config.unet else "the pretrained UNet"
    try:
        with torch.no_grad():
            predicted = model.unet(x_t, 0, **labels).sample
        dtype, predicted_shape = predicted.dtype, tuple(predicted.shape[1:])
    except BadInput:
        raise
    except Exception as error:  # the UNet may be a user's own
        call = f"unet(x_t, t).sample with x_t of {x_t.dtype} and shape (n, {shape})"
        shapes = isinstance(error, RuntimeError)  # as where images are halved and do not fit together again
        hint = f"; it may need another data.image_size than {shape[-1]}" if shapes else ""
        raise BadInput(f"{backbone}, called as {call}: {format_error(error)}{hint}") from error
    if (dtype, predicted_shape) != (x_t.dtype, shape):
        raise BadInput(
            f"{backbone} predicts {predicted_shape} of {dtype} for images of {shape} of {x_t.dtype}"
        )
