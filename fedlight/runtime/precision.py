"""The precision that a machine trains best in."""

import torch

FULL, HALF = "32-true", "bf16-mixed"


def best_precision(accelerator: str) -> str:
    """bf16 mixed with fp32 where the hardware multiplies in bf16, else fp32.

    Args:
        accelerator: as Lightning names it: `auto`, `cpu`, `gpu` or `cuda`; others train in fp32.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return HALF if torch.cuda.is_bf16_supported(including_emulation=False) else FULL
    if accelerator not in ("auto", "cpu"):
        return FULL
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return HALF if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16")) else FULL
