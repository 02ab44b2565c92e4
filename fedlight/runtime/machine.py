"""The machine that a cell runs on: its cores, its precision, and its description in the result."""

import os
import platform
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Cores that this process may use; a SLURM job may have fewer than the machine."""
FULL, HALF = "32-true", "bf16-mixed"
CPU_INFO = Path("/proc/cpuinfo")


def best_precision(accelerator: str) -> str:
    """bf16 mixed with fp32 if the hardware multiplies in bf16, else fp32.

    Args:
        accelerator: Lightning's name, `auto`, `cpu`, `gpu` or `cuda`; with others training is in fp32.
    """
    import torch

    if accelerator != "cpu" and torch.cuda.is_available():
        return HALF if torch.cuda.is_bf16_supported(including_emulation=False) else FULL
    if accelerator not in ("auto", "cpu"):
        return FULL
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return HALF if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16")) else FULL


def describe_machine() -> dict[str, str | int | None]:
    """Processor, cores, accelerator and operating system, without the name of the host."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _processor() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
