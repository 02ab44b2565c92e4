"""Low-rank adapters (LoRA, arXiv 2106.09685) in a UNet, by peft."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import atomic

INSTALL = "finetuning=lora needs peft: pip install 'fedlight[finetuning]'"
ADAPTER = "default"  # the name of the adapter in the UNet
ADAPTER_FOLDER = "adapter"  # in a cell's folder
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
FACTOR = re.compile(rf"\.lora_([AB])\.{ADAPTER}\.weight$")
ATTENTION, CONVOLUTIONS = "attention", "convolutions"
"""Groups of layers in `finetuning.targets`, beside names of layers."""
ATTENTION_LAYERS = re.compile(r"(^|\.)(attention|attentions|attn\d?)(\.|$)")
DEFAULT_TARGETS = (ATTENTION,)


def add_adapters(unet: ModelMixin, config: FinetuningConfig, seed: int) -> frozenset[str]:
    """Adds adapters to a UNet; their first values are random numbers for A and zero for B.

    Args:
        unet: all of whose weights are frozen.
        config: the section `finetuning`, of `lora`.
        seed: of the random numbers.

    Returns:
        The state_dict names that are not trained: all but those of the adapters, and with `train=b` all but
        the factors B.

    Raises:
        BadInput: peft is not installed, or a target is unknown.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BadInput(INSTALL) from error
    if running := [name for name, buffer in unet.named_buffers() if buffer.is_floating_point()]:
        raise BadInput(
            f"finetuning=lora does not train the pretrained model, and {running[0]} changes while it "
            "trains: choose finetuning=full, or a model without BatchNorm"
        )
    layers = find_targets(unet, config.targets or DEFAULT_TARGETS)
    rank = config.largest_rank
    _check_rank(unet, layers, rank)
    lora = LoraConfig(r=rank, lora_alpha=config.alpha or rank, target_modules=layers, bias="none")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, unet, adapter_name=ADAPTER)
    trained = "B" if config.train == "b" else "AB"
    frozen = set()
    for name, parameter in unet.named_parameters():
        factor = FACTOR.search(name)
        parameter.requires_grad_(factor is not None and factor[1] in trained)
        if not parameter.requires_grad:
            frozen.add(name)
    return frozenset(frozen | {name for name, _ in unet.named_buffers()})


def _check_rank(unet: nn.Module, layers: Sequence[str], rank: int) -> None:
    """Raises BadInput for a rank above that of every weight that gets an adapter."""
    largest = max(min(_matrix_shape(unet.get_submodule(name))) for name in layers)
    if rank > largest:
        raise BadInput(
            f"finetuning.rank={rank}: the weights of finetuning.targets have ranks up to {largest}; choose "
            "that at most, or finetuning=full"
        )


def _matrix_shape(layer: Any) -> tuple[int, int]:
    """The shape of a weight as a matrix, outputs and inputs."""
    return len(layer.weight), layer.weight[0].numel()


def rank_dimensions(names: Iterable[str]) -> dict[str, int]:
    """State_dict name of each factor of an adapter: its dimension of the rank, 0 for A and 1 for B."""
    factors = {name: FACTOR.search(name) for name in names}
    return {name: "AB".index(factor[1]) for name, factor in factors.items() if factor}


def find_targets(unet: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the layers that get an adapter, in the order of the UNet.

    Args:
        unet: without adapters.
        targets: `attention` for the linear layers and the 1x1 convolutions of attention, `convolutions` for
            all other convolutions but depthwise ones; any other text is a layer's name, or the last parts of
            the names of several, such as `to_q` or `mid.attention.qkv`.

    Raises:
        BadInput: a target stands for no layer that can have an adapter.
    """
    layers = dict(_adaptable(unet))
    chosen: set[str] = set()
    for target in targets:
        members = {name for name, layer in layers.items() if _is_target(name, layer, target)}
        if not members:
            last = sorted({name.rpartition(".")[2] or name for name in layers})
            raise BadInput(
                f"finetuning.targets: the pretrained model has no layer {target}; can be {ATTENTION}, "
                f"{CONVOLUTIONS}, or a name such as {', '.join(_examples(layers))} (last parts of names: "
                f"{', '.join(last[:12])})"
            )
        chosen |= members
    return [name for name in layers if name in chosen]


def _adaptable(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers, and the convolutions that are not depthwise."""
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            yield name, layer


def _is_target(name: str, layer: nn.Module, target: str) -> bool:
    in_attention = ATTENTION_LAYERS.search(name) is not None
    if target == ATTENTION:
        return in_attention
    if target == CONVOLUTIONS:
        return isinstance(layer, nn.Conv2d) and not in_attention
    return name == target or name.endswith(f".{target}")


def _examples(layers: Mapping[str, nn.Module]) -> list[str]:
    return list(layers)[:2]


def has_adapters(unet: nn.Module) -> bool:
    """Whether a UNet has adapters."""
    return any(FACTOR.search(name) for name, _ in unet.named_parameters())


def merge_adapters(unet: nn.Module) -> nn.Module:
    """A copy of a UNet whose weights are W + scaling B A, without adapters; itself where it has none."""
    if not has_adapters(unet):
        return unet
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = deepcopy(unet)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            place, _, last = name.rpartition(".")
            setattr(merged.get_submodule(place), last, layer.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(True)


def adapter_state(unet: nn.Module) -> dict[str, Tensor]:
    """The factors of all adapters as diffusers stores them, `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.

    The scaling alpha / rank is multiplied into B, so that a reader that assumes alpha = rank has the same
    model.
    """
    state = {}
    for name, layer in unet.named_modules():
        factors: Any = layer
        if hasattr(layer, "lora_A") and ADAPTER in factors.lora_A:
            first, second = factors.lora_A[ADAPTER].weight, factors.lora_B[ADAPTER].weight
            state[f"{name}.lora_A.weight"] = first.detach().contiguous().clone()
            scaled = second.detach() * factors.scaling[ADAPTER]
            state[f"{name}.lora_B.weight"] = scaled.contiguous().clone()
    return state


def save_adapter(folder: Path, unet: nn.Module) -> None:
    """Writes the adapters of a UNet as diffusers does, for `pipeline.load_lora_weights(folder)`."""
    state = {f"unet.{name}": tensor for name, tensor in adapter_state(unet).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / ADAPTER_FILE) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
