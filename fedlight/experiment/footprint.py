"""What a client of a cell needs before it runs: parameters that are trained and frozen, memory of a step."""

from dataclasses import dataclass
from typing import Any

from fedlight.experiment.parts import CellParts
from fedlight.experiment.step_time import STEP_SECTIONS, take_step
from fedlight.runtime.peak_memory import PeakGpuMemory, PeakMemory


@dataclass(frozen=True)
class Footprint:
    """The size of a client's model and of its training step.

    Attributes:
        trained: parameters that are trained.
        frozen: parameters of the UNet that are not.
        megabytes: peak memory of a process that takes a training step, in MB (1e6 bytes): on a GPU what torch
            allocates there, else resident memory; None where it is not known.
    """

    trained: int
    frozen: int
    megabytes: float | None


_megabytes_cache: dict[str, float | None] = {}  # the settings that decide it -> of one step


def measure_footprint(parts: CellParts) -> Footprint:
    """Counts the parameters of a client's model, and takes one training step for its peak of memory."""
    unet = parts.model.unet
    frozen = sum(p.numel() for name, p in unet.named_parameters() if f"unet.{name}" in parts.model.frozen)
    total = sum(parameter.numel() for parameter in unet.parameters())
    key = parts.config.model_dump_json(include=STEP_SECTIONS)
    if key not in _megabytes_cache:
        _megabytes_cache[key] = _take_step(parts)
    return Footprint(total - frozen, frozen, _megabytes_cache[key])


def _take_step(parts: CellParts) -> float | None:
    images = parts.first_batch(parts.largest_batch)
    peak: Any = PeakGpuMemory() if parts.device.type == "cuda" else PeakMemory()
    module: Any = parts.model.to(parts.device)
    optimizer = module.configure_optimizers()
    for callback in parts.frozen_bf16:
        callback.begin(module)
    take_step(parts.make_trainer().precision_plugin, module, optimizer, images)
    optimizer.zero_grad()
    megabytes: float | None = peak.megabytes
    for callback in parts.frozen_bf16:
        callback.end()
    return megabytes
